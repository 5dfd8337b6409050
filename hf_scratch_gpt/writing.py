"""Text from a model as it comes, and past the end of the context window."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

# A character has up to four bytes in UTF-8, and a byte-level token at least one.
_LONGEST_CHARACTER = 4


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
        generation: for `generate`, such as `do_sample`, `temperature`, `top_k`, `top_p`.

    Returns:
        What was written, without the prompt.

    Raises:
        ValueError: the prompt has no tokens, or `max_new_tokens` is below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} is below 1; ask for at least one token")
    ids = tokenizer(prompt, return_tensors="pt").input_ids  # (1, T)
    if not ids.shape[1]:
        raise ValueError(
            f"the prompt {prompt!r} has 0 tokens; give at least one character, or the "
            f"end-of-text token {tokenizer.eos_token} to begin a text"
        )
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    window = model.config.max_position_embeddings
    streamer = _PieceStreamer(tokenizer, on_text)
    ids = ids.to(model.device)
    left = max_new_tokens
    while left:
        if ids.shape[1] >= window:
            ids = ids[:, -max(1, window // 2) :]
        count = min(left, max(1, window - ids.shape[1]))
        ids = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            streamer=streamer,
            **generation,
        )
        left -= count
        if ids[0, -1].item() in ends:
            break
    streamer.hand_over()
    return streamer.written


class _PieceStreamer(BaseStreamer):
    """Decodes new tokens as `generate` hands them over, holding back incomplete characters."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None] | None
    ) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._held: list[int] = []
        self._prompt_comes = True
        self.written = ""

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_comes:
            self._prompt_comes = False
            return
        self._held += value.flatten().tolist()
        is_complete = not self._tokenizer.decode(self._held).endswith("\ufffd")
        if is_complete or len(self._held) >= _LONGEST_CHARACTER:
            self.hand_over()

    def end(self) -> None:
        self._prompt_comes = True  # of the next window

    def hand_over(self) -> None:
        """Give out what is held back."""
        text = self._tokenizer.decode(self._held, skip_special_tokens=True)
        self._held.clear()
        self.written += text
        if text and self._on_text is not None:
            self._on_text(text)
