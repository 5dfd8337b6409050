"""How well a language model predicts texts: perplexity by a sliding window, bits per byte."""

# T tokens of a window, N of them to score, V vocabulary

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .characters import encoded

# The longest window that is taken unasked; models with 128k positions need more memory than most
# machines have.
LONGEST_WINDOW = 4096
# Characters of a text that are encoded at once.
LONGEST_PIECE = 1 << 21


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measures.

    Args:
        nats_per_token: mean negative log-likelihood of a scored token.
        texts, bytes, tokens: how much was read; bytes are those of UTF-8.
        scored_tokens: those that were predicted. A text's first token is not, nor, with a stride
            as long as the window, each window's.
        window, stride: in tokens.
        seconds: duration, tokenization included.
    """

    nats_per_token: float
    texts: int
    bytes: int
    tokens: int
    scored_tokens: int
    window: int
    stride: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-likelihood; infinite where a float is short."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Tokens per byte times bits per token (Gao et al. 2020, section 3.1).

        It does not depend on the vocabulary, so it compares models with different tokenizers.
        """
        return self.tokens / self.bytes * self.nats_per_token / math.log(2)


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pieces: Iterable[tuple[str, bool, float]],
    window: int | None = None,
    stride: int | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Evaluation:
    """Measure how well `model` predicts texts, each by itself.

    The window moves on by `stride` tokens and scores those that no window before it has seen, as
    in "Perplexity of fixed-length models" of transformers' documentation. Each scored token counts
    once; that page counts a token less in every window but the first, which is the same to four
    digits for texts of many windows.

    Args:
        model: any causal language model; it is put into evaluation mode.
        tokenizer: its tokenizer.
        pieces: texts in parts that fit in memory, as `training.texts.read` gives them: a part,
            whether its text ends there, and the bytes read for it.
        window: tokens that the model sees at once; its positions, at most `LONGEST_WINDOW`, if not
            given.
        stride: tokens by which the window moves; half the window if not given. Shorter ones give
            each token more context, and take longer.
        on_progress: called with the bytes of each window that is done.

    Raises:
        ValueError: `window` or `stride` is out of range, no token can be scored, or the loss is not
            finite.
    """
    window, stride = _sizes(model.config, window, stride)
    model.eval()
    started, reader = time.perf_counter(), _Reader(tokenizer, window, stride)
    nats, scored_tokens = 0.0, 0
    for ids, known, size in reader.windows(pieces):
        known = max(known, 1)
        logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits
        scores = logits[0, known - 1 : -1].float()  # (N, V)
        nats += F.cross_entropy(scores, ids[known:].to(scores.device), reduction="sum").item()
        scored_tokens += len(ids) - known
        if on_progress is not None:
            on_progress(size)
    if not scored_tokens:
        raise ValueError(
            f"nothing can be scored: the tokenizer makes {reader.tokens} tokens of "
            f"{reader.bytes:,} bytes; give longer texts, or a model that is saved with its "
            "vocabulary"
        )
    if not math.isfinite(nats):
        raise ValueError(f"the loss is {nats}; the model has weights that are NaN or too large")
    return Evaluation(
        nats_per_token=nats / scored_tokens,
        texts=reader.texts,
        bytes=reader.bytes,
        tokens=reader.tokens,
        scored_tokens=scored_tokens,
        window=window,
        stride=stride,
        seconds=time.perf_counter() - started,
    )


def _sizes(config: PretrainedConfig, window: int | None, stride: int | None) -> tuple[int, int]:
    """Window and stride, checked, by default as long as `evaluate` says."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    window = int(min(positions, LONGEST_WINDOW)) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 2 <= window <= positions:
        raise ValueError(
            f"a window of {window} tokens is not between 2 and the model's {positions} positions; "
            "choose another"
        )
    if not 1 <= stride <= window:
        raise ValueError(
            f"a stride of {stride} tokens is not between 1 and the window's {window}; choose "
            "another"
        )
    return window, stride


class _Reader:
    """Cuts texts into windows of token ids, and counts what it reads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, window: int, stride: int) -> None:
        self._tokenizer, self._window, self._stride = tokenizer, window, stride
        self.texts = self.bytes = self.tokens = 0

    def windows(
        self, pieces: Iterable[tuple[str, bool, float]]
    ) -> Iterator[tuple[torch.Tensor, int, float]]:
        """Each window's ids (T,), how many of them an earlier one had, and its share of bytes."""
        ids, known, begins = torch.tensor([], dtype=torch.long), 0, True
        for text, ends, size in _joined(pieces):
            more = self._encode(text, begins)
            share = size / max(1, len(more))
            ids = torch.cat([ids, more])
            while len(ids) >= self._window:
                yield ids[: self._window], known, share * (self._window - known)
                ids, known = ids[self._stride :], self._window - self._stride
            if ends:
                if len(ids) > max(known, 1):
                    yield ids, known, share * (len(ids) - known)
                self.texts += 1
                ids, known = ids[:0], 0
            begins = ends

    def _encode(self, text: str, begins: bool) -> torch.Tensor:
        """The ids of a part of a text, with what the tokenizer puts before the first one."""
        ids = encoded(self._tokenizer, text, add_special_tokens=begins)["input_ids"]
        self.bytes += len(text.encode())
        self.tokens += len(ids)
        return torch.tensor(ids, dtype=torch.long)


def _joined(pieces: Iterable[tuple[str, bool, float]]) -> Iterator[tuple[str, bool, float]]:
    """Pieces with short texts whole, as some tokenizers encode the parts otherwise."""
    text, size = "", 0.0
    for more, ends, more_size in pieces:
        text, size = text + more, size + more_size
        if ends or len(text) > LONGEST_PIECE:
            yield text, ends, size
            text, size = "", 0.0
