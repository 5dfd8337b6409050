"""Texts -> one stream of token ids in a file, computed once -> blocks that a model is trained on.

Documents follow one another in the stream, each with the end-of-text token after it, and blocks are
equal parts of it: there is no padding, and a document may go on from block to block.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..files import new_file
from .texts import Piece, Sources, find, read, size_of

# How many characters a core gets at a time: enough that none waits long for the others at the end.
# A character takes about ten bytes of lists, so the text for more than 16 cores is that for 16.
CHARACTERS_PER_CORE = 4 << 20
_MOST_CORES = 16

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
    tokenizer gets a batch of long pieces at a time, which fast tokenizers encode in threads.

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
    folder = Path(cache_dir) if cache_dir is not None else Path(HF_HOME, "hf_scratch_gpt")
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
    digest, tokens = hashlib.sha256(), 0
    with new_file(path) as unfinished:
        with unfinished.open("wb") as file:
            for batch in _batches(found, field):
                texts = [piece.text for piece in batch]
                rows = tokenizer(
                    texts, add_special_tokens=False, return_attention_mask=False, verbose=False
                )["input_ids"]
                for piece, row in zip(batch, rows, strict=True):
                    ids = [*row, tokenizer.eos_token_id] if piece.ends else row
                    data = np.array(ids, dtype).tobytes()
                    file.write(data)
                    digest.update(data)
                    tokens += len(ids)
        described: dict[str, Any] = dict(dtype=dtype, tokens=tokens, digest=digest.hexdigest())
        path.unlink(missing_ok=True)
        path.with_suffix(".json").write_text(json.dumps(described), encoding="utf-8")
    return TokenFile(path, **described)


def _batches(found: list[Any], field: str) -> Iterator[list[Piece]]:
    """Pieces, enough at a time to keep all cores busy; shows progress."""
    total = sum(map(size_of, found))
    limit = CHARACTERS_PER_CORE * min(os.cpu_count() or 1, _MOST_CORES)
    pieces = chain.from_iterable(read(source, field) for source in found)
    with logging.tqdm(total=total, unit="B", unit_scale=True, desc="Tokenizing") as progress:
        while batch := _take(pieces, limit):
            yield batch
            progress.update(sum(piece.size for piece in batch))


def _take(pieces: Iterator[Piece], limit: int) -> list[Piece]:
    """The next pieces, until they have `limit` characters."""
    batch: list[Piece] = []
    while limit > 0 and (piece := next(pieces, None)) is not None:
        batch.append(piece)
        limit -= len(piece.text)
    return batch


class Blocks(Dataset):
    """Equal parts of a stream of tokens, as a model is trained on them.

    Item i is `input_ids` and `labels`, both (`block_size`,) of int64 and equal: the model shifts
    the labels. Tokens at the end that do not fill a block are dropped.

    Args:
        file: the stream.
        block_size: tokens in a block.
        places: which blocks of the stream; all of them if not given.

    Raises:
        ValueError: the stream is shorter than a block.
    """

    def __init__(self, file: TokenFile, block_size: int, places: range | None = None) -> None:
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


def whole_batches(blocks: Blocks, batch_size: int) -> Dataset:
    """Blocks, the first of them repeated at the end until they fill the last batch.

    All steps are then of one size, and the same for any number of processes that share a batch.
    """
    count = math.ceil(len(blocks) / batch_size) * batch_size
    return Subset(blocks, np.arange(count) % len(blocks))  # type: ignore[arg-type]  # ints, in less memory than a list
