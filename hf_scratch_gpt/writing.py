"""Text from a model as it comes, and past the end of the context window."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import (
    EosTokenCriteria,
    GenerationMixin,
    MaxTimeCriteria,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer


def write(
    model: GenerationMixin,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 200,
    on_text: Callable[[str], None] | None = None,
    **generation: Any,
) -> str:
    """Continue `prompt`, by a text of any length.

    Where the text reaches the model's last position, the model reads the last half of its window
    again as a new beginning; it has forgotten what came before.

    Args:
        model: a language model; `config.max_position_embeddings` is the length of its window.
        tokenizer: its tokenizer.
        prompt: what to continue, of at least one token. The model reads the end of a prompt that is
            longer than the window.
        max_new_tokens: how many tokens to write at most; the end-of-text token ends the text.
        on_text: called with each piece of text as soon as its characters are complete.
        generation: for `generate`, such as `do_sample`, `top_k`, `stop_strings`, `max_time`.

    Returns:
        What was written, without the prompt.

    Raises:
        ValueError: the prompt has no tokens, the tokenizer no vocabulary, or `max_new_tokens` is
            below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} is below 1; ask for at least one token")
    streamer = _PieceStreamer(tokenizer, on_text)
    ids = _encode(tokenizer, prompt).to(model.device)
    _generate(model, tokenizer, ids, max_new_tokens, streamer=streamer, **generation)
    streamer.hand_over(is_last=True)
    return streamer.written


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    """The ids of `prompt` (1, T), at least one."""
    if not tokenizer.vocab_size:  # without tokens that were added, such as the end of text
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no vocabulary; give one with "
            "tokenizer.json, or vocab.json and merges.txt"
        )
    ids = tokenizer(prompt, return_tensors="pt", verbose=False).input_ids
    if not ids.shape[1]:
        raise ValueError(
            f"the prompt {prompt!r} has 0 tokens; give at least one character, or the "
            f"end-of-text token {tokenizer.eos_token} to begin a text"
        )
    return ids


def _generate(
    model: GenerationMixin,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    left: int,
    stopping_criteria: Iterable[StoppingCriteria] = (),
    stop_strings: str | list[str] | None = None,
    max_time: float | None = None,
    **generation: Any,
) -> None:
    """Write `left` tokens after `ids` (1, T) a window at a time, or to where generation ends."""
    settings = generation.get("generation_config") or model.generation_config
    criteria = StoppingCriteriaList(stopping_criteria)
    if stop_strings:
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
    if max_time:
        criteria.append(MaxTimeCriteria(max_time))  # of all windows together
    end = generation.get("eos_token_id", settings.eos_token_id)
    ends = criteria if end is None else [*criteria, EosTokenCriteria(end)]
    window, has_ended = model.config.max_position_embeddings, False
    while left and not has_ended:
        if ids.shape[1] >= window:
            ids = ids[:, -max(1, window // 2) :]
        begun, count = ids.shape[1], min(left, max(1, window - ids.shape[1]))
        ids = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            stopping_criteria=criteria,
            **generation,
        )
        left -= count
        # A window may end by its length and by another criterion at once.
        has_ended = ids.shape[1] < begun + count or any(
            criterion(ids, None).any() for criterion in ends
        )


class _PieceStreamer(BaseStreamer):
    """Decodes new tokens as `generate` hands them over, holding back incomplete characters.

    A piece is what its tokens add to the text of those before: alone, one would lose its space.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None] | None
    ) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._before: list[int] = []  # the prompt, then the last piece
        self._held: list[int] = []
        self._prompt_comes = True
        self.written = ""

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_comes:
            self._held += value.flatten().tolist()
            self.hand_over()
        elif not self._before:
            self._before = value.flatten().tolist()
        self._prompt_comes = False

    def end(self) -> None:
        self._prompt_comes = True  # of the next window

    def hand_over(self, is_last: bool = False) -> None:
        """Give out what is held back, if its last character is complete or `is_last`."""
        before, text = (
            self._tokenizer.decode(ids, skip_special_tokens=True)
            for ids in (self._before, self._before + self._held)
        )
        piece = text[len(before) :]
        if piece and (is_last or not piece.endswith("\ufffd")):
            self._before, self._held = self._held, []
            self.written += piece
            if self._on_text is not None:
                self._on_text(piece)
