"""Texts -> one stream of token ids in a file, computed once -> blocks that a model is trained on.

Documents follow one another in the stream, each with the end-of-text token after it, and blocks are
equal parts of it: there is no padding, and a document may go on from block to block.
"""

import hashlib
import json
import math
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HOME
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..files import new_file
from .texts import Piece, Sources, find, read, size_of

# How many characters a thread encodes at a time; each takes about ten bytes of lists.
CHARACTERS = 1 << 20

CACHE = Path(HF_HOME, "hf_scratch_gpt")

# Part of the name of a cached stream; to be raised when the same texts give other tokens.
_FORMAT = 2


@dataclass(frozen=True)
class TokenFile:
    """A stream of `tokens` ids of numpy's `dtype` on disk, ends of texts included, and its hash."""

    path: Path
    dtype: str
    tokens: int
    digest: str

    def ids(self) -> np.memmap:
        """The ids, (`tokens`,), read from disk where they are used."""
        return np.memmap(self.path, dtype=self.dtype, mode="r")


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of ids a model needs for `tokenizer`: its highest id plus one."""
    return max(tokenizer.get_vocab().values()) + 1


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what decides which ids `tokenizer` gives: vocabulary, merges, added tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        described: dict[str, Any] = {"vocabulary": tokenizer.get_vocab()}
    else:
        described = json.loads(backend.to_str())
        # Every call of the tokenizer sets these two, and they are not used here.
        described.pop("truncation", None)
        described.pop("padding", None)
    described["end"] = tokenizer.eos_token_id
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def tokenize(
    sources: Sources,
    tokenizer: PreTrainedTokenizerBase,
    text_field: str = "text",
    cache_dir: str | os.PathLike[str] | None = None,
) -> TokenFile:
    """Encode the texts of `sources`, or find the ids of an earlier time.

    They are kept in a file whose name is a hash of the tokenizer and of the files' paths, sizes and
    times of change. Of several processes that ask for the same ids, one computes them. The
    tokenizer is called in as many threads as there are cores.

    Args:
        sources: as for `texts.find`.
        text_field: name of the field or column with the text.
        tokenizer: must have an end-of-text token (`eos_token`).
        cache_dir: where to keep the ids; `hf_scratch_gpt` in Hugging Face's own cache if not given.

    Raises:
        ValueError: a source is missing or bad, or the tokenizer has no end-of-text token.
        ImportError: a source needs a package that is not installed.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-text token to put between documents; set its eos_token"
        )
    found = find(sources)
    folder = CACHE if cache_dir is None else Path(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_cache_key(found, tokenizer, text_field)}.ids"
    with FileLock(f"{path}.lock"):
        return _cached(path) or _encode_to(path, found, tokenizer, text_field)


def _cache_key(found: list[Any], tokenizer: PreTrainedTokenizerBase, field: str) -> str:
    places = []
    for source in found:
        kind, files = "file", [source]
        if not isinstance(source, Path):
            kind = f"{source.info.dataset_name} {source.info.config_name}"
            files = [entry["filename"] for entry in source.cache_files]
        paths = [Path(file).resolve() for file in files]
        stats = [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        places.append([kind, *stats])
    key = json.dumps([_FORMAT, fingerprint(tokenizer), field, places], default=str)
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def _cached(path: Path) -> TokenFile | None:
    """The stream in `path`, if it is there and complete."""
    try:
        file = TokenFile(path, **json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
        is_complete = path.stat().st_size == file.tokens * np.dtype(file.dtype).itemsize
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return file if is_complete else None


def _encode_to(
    path: Path, found: list[Any], tokenizer: PreTrainedTokenizerBase, field: str
) -> TokenFile:
    """Write the stream to `path`; whatever happens, it is there completely or not at all."""
    dtype = "uint16" if vocabulary_size(tokenizer) <= 1 << 16 else "uint32"
    digest, size = hashlib.sha256(), 0
    with new_file(path) as unfinished:
        with unfinished.open("wb") as file:
            for data in _encoded(found, tokenizer, field, dtype):
                file.write(data)
                digest.update(data)
                size += len(data)
        tokens = size // np.dtype(dtype).itemsize
        described: dict[str, Any] = dict(dtype=dtype, tokens=tokens, digest=digest.hexdigest())
        path.unlink(missing_ok=True)
        path.with_suffix(".json").write_text(json.dumps(described), encoding="utf-8")
    return TokenFile(path, **described)


def _encoded(
    found: list[Any], tokenizer: PreTrainedTokenizerBase, field: str, dtype: str
) -> Iterator[bytes]:
    """The stream, computed by a thread for each core; shows progress."""

    def encode(texts: list[str], ends: list[bool]) -> bytes:
        options = dict(add_special_tokens=False, return_attention_mask=False, verbose=False)
        rows = tokenizer(texts, **options)["input_ids"]
        streams = (
            row + [tokenizer.eos_token_id] * end for row, end in zip(rows, ends, strict=True)
        )
        return b"".join(np.array(ids, dtype).tobytes() for ids in streams)

    encode([""], [True])  # The first call may change the tokenizer, which must be one thread's.
    pieces = chain.from_iterable(read(source, field) for source in found)
    cores = os.cpu_count() or 1
    waiting: deque[tuple[float, Future[bytes]]] = deque()
    pool, total = ThreadPoolExecutor(cores), sum(map(size_of, found))
    with logging.tqdm(total=total, unit="B", unit_scale=True, desc="Tokenizing") as progress:
        try:
            while (batch := _take(pieces)) or waiting:
                if batch:
                    job = pool.submit(encode, [p.text for p in batch], [p.ends for p in batch])
                    waiting.append((sum(piece.size for piece in batch), job))
                if not batch or len(waiting) > 2 * cores:
                    size, job = waiting.popleft()
                    yield job.result()
                    progress.update(size)
        finally:
            pool.shutdown(cancel_futures=True)


def _take(pieces: Iterator[Piece]) -> list[Piece]:
    """The next pieces, until they have `CHARACTERS`."""
    batch: list[Piece] = []
    limit = CHARACTERS
    while limit > 0 and (piece := next(pieces, None)) is not None:
        batch.append(piece)
        limit -= len(piece.text)
    return batch


def clear_cache(cache_dir: str | os.PathLike[str] | None = None) -> int:
    """Remove the ids that `tokenize` has kept, apart from those that are being written.

    A training that is running on them fails; started again, it encodes its texts again.

    Args:
        cache_dir: as for `tokenize`.

    Returns:
        How many bytes were removed.
    """
    folder, removed = CACHE if cache_dir is None else Path(cache_dir), 0
    for path in [*folder.glob("*")]:
        if name := re.fullmatch(r"([0-9a-f]{32})\.(ids|json|ids\.unfinished)", path.name):
            lock = FileLock(folder / f"{name[1]}.ids.lock", timeout=0)
            with suppress(Timeout, FileNotFoundError), lock:
                size = path.stat().st_size
                path.unlink()
                removed += size
    return removed


class Blocks(Dataset):
    """Equal parts of a stream of tokens, as a model is trained on them.

    Item i is `input_ids` and `labels`, both (`block_size`,) of int64 and equal: the model shifts
    the labels. Tokens at the end that do not fill a block are dropped.

    Args:
        file: the stream.
        block_size: tokens in a block.
        places: numbers of the blocks in the stream; all of them if not given.

    Raises:
        ValueError: the stream is shorter than a block.
    """

    def __init__(
        self, file: TokenFile, block_size: int, places: Sequence[int] | None = None
    ) -> None:
        if block_size < 2:
            raise ValueError(f"block_size={block_size} leaves no token to predict; give 2 or more")
        if file.tokens < block_size:
            raise ValueError(
                f"the texts are {file.tokens} tokens, less than one block of {block_size}; give "
                "more text, or a smaller block_size"
            )
        self.file, self.block_size = file, block_size
        self.places = range(file.tokens // block_size) if places is None else places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        first = self.places[index] * self.block_size * np.dtype(self.file.dtype).itemsize
        # A memory map would be copied, with all its ids, to a data loader's processes.
        block = np.fromfile(self.file.path, self.file.dtype, self.block_size, offset=first)
        ids = torch.from_numpy(block.astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}

    def split(self, fraction: float) -> "tuple[Blocks, Blocks]":
        """Take the last `fraction` of the blocks, at least one, for validation.

        Raises:
            ValueError: `fraction` is not between 0 and 1, or nothing would be left to train on.
        """
        if not 0 < fraction < 1:
            raise ValueError(
                f"validation={fraction} is not a part of the blocks; give a number from 0 to 1"
            )
        border = len(self) - max(1, round(fraction * len(self)))
        if border < 1:
            raise ValueError(
                f"{len(self)} blocks of {self.block_size} tokens are too few to train on some and "
                f"validate on {fraction:.0%}; give more text, a smaller block_size, or texts of "
                "their own to validate on"
            )
        training, validation = self.places[:border], self.places[border:]
        return (
            Blocks(self.file, self.block_size, training),
            Blocks(self.file, self.block_size, validation),
        )

    def spread(self, tokens: int) -> "Blocks":
        """Blocks of at most `tokens` tokens, or one block, spread evenly over these.

        Raises:
            ValueError: `tokens` is below 1.
        """
        if tokens < 1:
            raise ValueError(f"validation_tokens={tokens} is below 1; give 1 or more")
        count = min(len(self), max(1, tokens // self.block_size))
        places = [self.places[i * len(self) // count] for i in range(count)]
        return Blocks(self.file, self.block_size, places)


def whole_batches(blocks: Blocks, batch_size: int) -> Dataset:
    """Blocks, the first of them repeated at the end until they fill the last batch.

    All steps are then of one size, and the same for any number of processes that share a batch.
    """
    count = math.ceil(len(blocks) / batch_size) * batch_size
    return Subset(blocks, np.arange(count) % len(blocks))  # type: ignore[arg-type]  # ints, in less memory than a list
