"""Text from a model as it comes, past the end of the context window, and in conversation."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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

from .characters import encoded


@dataclass(frozen=True)
class Written:
    """What a model has written after a prompt.

    Args:
        text: without the prompt and without special tokens.
        ids: the tokens written, one that ends the text included.
        logprobs: for each of them, the natural logarithm of its probability by the model alone,
            whatever temperature or choice there was; empty if they were not asked for.
        cut: how many tokens of prompt and text had left the window in the end.
    """

    text: str
    ids: list[int]
    logprobs: list[float]
    cut: int


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
    ids = encode(tokenizer, prompt)
    return write_after(model, tokenizer, ids, max_new_tokens, on_text, **generation).text


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The ids of `prompt` by `tokenizer`, at least one; a ValueError if there are none."""
    if not tokenizer.vocab_size:  # without tokens that were added, such as the end of text
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no vocabulary; give one with "
            "tokenizer.json, or vocab.json and merges.txt"
        )
    ids: list[int] = encoded(tokenizer, prompt).input_ids
    if not ids:
        raise ValueError(
            f"the prompt {prompt!r} has 0 tokens; give at least one character, or the "
            f"end-of-text token {tokenizer.eos_token} to begin a text"
        )
    return ids


def write_after(
    model: GenerationMixin,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    max_new_tokens: int = 200,
    on_text: Callable[[str], None] | None = None,
    with_logprobs: bool = False,
    **generation: Any,
) -> Written:
    """Continue a text of tokens as `write` does.

    Args:
        model, tokenizer, max_new_tokens, on_text, generation: as for `write`.
        ids: the tokens, at least one.
        with_logprobs: tell how probable each token was; the model reads each window once more.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} is below 1; ask for at least one token")
    streamer = _PieceStreamer(tokenizer, on_text)
    start = torch.tensor([[*ids]], device=model.device)
    written: list[int] = []
    logprobs: list[float] = []
    for window, begun in _windows(
        model, tokenizer, start, max_new_tokens, streamer=streamer, **generation
    ):
        written += window[0, begun:].tolist()
        if with_logprobs:
            logprobs += _logprobs(model, window, begun)
    streamer.hand_over(is_last=True)
    cut = len(ids) + len(written) - window.shape[1]
    return Written(streamer.written, written, logprobs, cut)


def _windows(
    model: GenerationMixin,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    left: int,
    stopping_criteria: Iterable[StoppingCriteria] = (),
    stop_strings: str | list[str] | None = None,
    max_time: float | None = None,
    **generation: Any,
) -> Iterator[tuple[torch.Tensor, int]]:
    """Write `left` tokens after `ids` (1, T) a window at a time, or to where generation ends.

    Gives each window (1, T) and how many of its tokens the model was given.
    """
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
        yield ids, begun
        left -= count
        # A window may end by its length and by another criterion at once.
        has_ended = ids.shape[1] < begun + count or any(
            criterion(ids, None).any() for criterion in ends
        )


@torch.no_grad()
def _logprobs(model: Any, ids: torch.Tensor, begun: int) -> list[float]:
    """Log-probabilities of the tokens of `ids` (1, T) from place `begun` on."""
    logits = model(ids, use_cache=False).logits[0, begun - 1 : -1].float()  # (T - begun, V)
    return logits.log_softmax(-1).gather(-1, ids[0, begun:, None])[:, 0].tolist()


class Conversation:
    """What a user and a model have said, put together by the tokenizer's chat template.

    Args:
        tokenizer: one with a `chat_template`.
        room: how many tokens the messages may take; the oldest are left out to keep to it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, room: int) -> None:
        self._tokenizer, self._room = tokenizer, room
        self._messages: list[dict[str, str]] = []

    def ask(self, text: str) -> tuple[list[int], int]:
        """The ids to answer, of `text` and what was said before; how many messages were left out.

        A single message stays, however long it is.
        """
        self._messages.append({"role": "user", "content": text})
        before = len(self._messages)
        while len(ids := self._encode()) > self._room and len(self._messages) > 1:
            del self._messages[:2]  # a question and its answer
        return ids, before - len(self._messages)

    def answer(self, text: str) -> None:
        """Keep what the model has answered."""
        self._messages.append({"role": "assistant", "content": text})

    def _encode(self) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            self._messages, tokenize=False, add_generation_prompt=True
        )
        # The template has written the special tokens.
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids


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
