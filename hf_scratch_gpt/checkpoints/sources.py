"""What a reader of a checkpoint format returns, and what the readers share."""

import mmap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, PreTrainedTokenizerFast

from ..model.configuration_scratch_gpt import ScratchGPTConfig
from .names import CAUSAL_MASK

# What torch.compile and DistributedDataParallel put before the names of what they wrap.
WRAPPERS = ("_orig_mod.", "module.")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor with its name, shape and data type in a file, where it still is.

    `read` reads it, each time anew.
    """

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    def made(
        self, change: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]
    ) -> "StoredTensor":
        """The tensor of `shape` that `change` makes of this one."""
        return replace(self, shape=shape, read=lambda: change(self.read()))

    @property
    def where(self) -> str:
        """File and name, for messages."""
        return f"{self.file}: {self.name}"

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise a ValueError unless it has the `shape` and the data type of a weight."""
        if self.shape != shape:
            asked = f"and the configuration asks for {list(shape)}"
            raise ValueError(f"{self.where} has shape {list(self.shape)}, {asked}")
        if self.dtype not in _DTYPES:
            allowed = ", ".join(map(str, _DTYPES))
            raise ValueError(f"{self.where} holds {self.dtype}; weights are {allowed}")


@dataclass
class GPT2Source:
    """A GPT-2 in any format, opened but not read.

    Args:
        origin: the format, in words.
        path: the file, folder or hub id.
        config: sizes and switches of what it becomes.
        theirs: what its own code computes, in the terms of transformers' GPT-2. Verification goes
            by this, so it is never made of `config`.
        tensors: by transformers' name in a base model, and `lm_head.weight`; what has no such name
            by its own.
        dropped: names of tensors left out on purpose, and why.
        notes: what else a user should know of how it was read.
        inputs_first: whether matrices are (inputs, outputs).
        biases_optional: whether a missing bias is a bias of zeros.
        tokenizer: the vocabulary that came with it.
        tokenizer_files: what to copy in its place.
        digests: SHA-256 that files must have, by their paths.
        unchecked: files without a checksum, in their format or in a list of digests.
    """

    origin: str
    path: str
    config: ScratchGPTConfig
    theirs: GPT2Config
    tensors: dict[str, StoredTensor]
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    inputs_first: bool = False
    biases_optional: bool = False
    tokenizer: PreTrainedTokenizerFast | None = None
    tokenizer_files: list[Path] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    unchecked: list[str] = field(default_factory=list)

    def adopt(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Take `tokenizer`, and from it the special tokens that the configuration lacks."""
        self.tokenizer, self.tokenizer_files = tokenizer, []
        for name in TOKENS:
            if getattr(self.config, name) is None:
                setattr(self.config, name, getattr(tokenizer, name))
        positions = self.config.max_position_embeddings
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)

    def untie_or_drop_head(self) -> None:
        """Drop the output head if it is the token embedding, else untie them."""
        head, embedding = self.tensors.get("lm_head.weight"), self.tensors.get("wte.weight")
        if head is None:
            return
        if embedding is None:
            self.tensors["wte.weight"] = self.tensors.pop("lm_head.weight")
            self.notes.append(f"took     {head.name} as the token embedding too, which is missing")
        elif head.dtype == embedding.dtype and torch.equal(head.read(), embedding.read()):
            self.dropped[head.name] = "the same as the token embedding"
            del self.tensors["lm_head.weight"]
        else:
            self.config.tie_word_embeddings = self.theirs.tie_word_embeddings = False

    def trim_vocabulary(self, size: int) -> None:
        """Keep the first `size` tokens, of which the last ends texts, and drop the padding."""
        for name in ("wte.weight", "lm_head.weight"):
            if (whole := self.tensors.get(name)) is None:
                continue
            if len(whole.shape) != 2 or whole.shape[0] < size:
                raise ValueError(f"{whole.where} has shape {list(whole.shape)}, below {size} rows")
            shape, rows = (size, whole.shape[1]), whole.shape[0] - size
            self.tensors[name] = whole.made(lambda tensor: tensor[:size], shape)
            self.dropped[f"{whole.name}, last {rows} rows"] = "padding of the vocabulary"
        self.config.vocab_size = self.theirs.vocab_size = size
        for token in TOKENS:
            setattr(self.config, token, size - 1)


def joined(parts: list[StoredTensor]) -> StoredTensor:
    """One tensor of equal `parts` along the outputs."""
    first, *others = parts
    if not others:
        return first
    for part in others:
        part.check(first.shape)
    return replace(
        first,
        name=" and ".join(part.name for part in parts),
        shape=(sum(part.shape[0] for part in parts if part.shape), *first.shape[1:]),
        read=lambda: torch.cat([part.read() for part in parts]),
    )


def gpt2(**fields: Any) -> GPT2Config:
    """The configuration of a GPT-2 by transformers' code, without special tokens."""
    return GPT2Config(**fields | dict.fromkeys(TOKENS))


@contextmanager
def told_as_error(path: str | Path) -> Iterator[None]:
    """Raise what goes wrong with the content of the file `path` as a ValueError that names it."""
    try:
        yield
    except Exception as error:  # the tokenizers library raises no other class
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, ValueError) and str(path) in reason:
            raise
        if isinstance(error, (AttributeError, LookupError, TypeError)):  # in Python's own words
            reason = "it does not have the content that its reader expects"
        raise ValueError(f"{path}: {reason}") from None


def map_tensor(
    path: str | Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """The contiguous tensor at byte `offset` of the file `path`, which is long enough.

    It is mapped, not read: memory is taken as it is touched, and given back with the tensor.
    """
    count, before = prod(shape), offset % mmap.ALLOCATIONGRANULARITY
    if not count:
        return torch.empty(shape, dtype=dtype)
    size = before + count * dtype.itemsize
    with Path(path).open("rb") as file:
        # A copy on write, since torch has no tensors that cannot be written to.
        area = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, offset=offset - before)
    return torch.frombuffer(area, dtype=dtype, count=count, offset=before).reshape(shape)


def by_plain_name(
    tensors: Iterable[StoredTensor], prefixes: tuple[str, ...] = WRAPPERS
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """`tensors` by their names without `prefixes`; names of causal masks, left out, and the reason.

    A ValueError tells which two tensors have the same name then.
    """
    named: dict[str, StoredTensor] = {}
    dropped: dict[str, str] = {}
    for tensor in tensors:
        name = tensor.name
        while prefix := next(filter(name.startswith, prefixes), ""):
            name = name.removeprefix(prefix)
        if CAUSAL_MASK.fullmatch(name):
            dropped[tensor.name] = "a causal mask, made anew for each text"
            continue
        if name in named:
            raise ValueError(
                f"{named[name].where} and {tensor.where} are both {name}; remove one of them"
            )
        named[name] = tensor
    return named, dropped
