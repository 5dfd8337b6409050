"""Texts -> one stream of token ids in a file, computed once.

Documents follow one another in the stream, each with the end-of-text token after it.
"""

import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..characters import encoded
from ..files import give_memory_back, new_file
from ..model.tokenization_scratch_gpt import ScratchGPTTokenizer
from .texts import Piece, Sources, find, read, size_of

# How many characters a thread encodes at a time; each takes about ten bytes of lists.
CHARACTERS = 1 << 19

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
    key = json.dumps([_FORMAT, fingerprint(tokenizer), field, places_of(found)], default=str)
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def places_of(found: list[Any]) -> list[Any]:
    """What tells whether the sources that `find` returned are the same as before."""
    places = []
    for source in found:
        kind, files = "file", [source]
        if not isinstance(source, Path):
            kind = f"{source.info.dataset_name} {source.info.config_name}"
            files = [entry["filename"] for entry in source.cache_files]
        paths = [Path(file).resolve() for file in files]
        stats = [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        places.append([kind, *stats])
    return places


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
        options = dict(add_special_tokens=False, return_attention_mask=False)
        rows = encoded(tokenizer, texts, **options)["input_ids"]
        streams = (
            row + [tokenizer.eos_token_id] * end for row, end in zip(rows, ends, strict=True)
        )
        return b"".join(np.array(ids, dtype).tobytes() for ids in streams)

    encode([""], [True])  # The first call may change the tokenizer, which must be one thread's.
    pieces = chain.from_iterable(read(source, field) for source in found)
    if _has_plain_end(tokenizer):
        pieces = chain.from_iterable(_split(piece, tokenizer.eos_token) for piece in pieces)
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
            give_memory_back()


def _has_plain_end(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the texts around an end-of-text token in a text are encoded as they are alone."""
    token = tokenizer.added_tokens_decoder.get(tokenizer.eos_token_id)
    return (
        isinstance(tokenizer, ScratchGPTTokenizer)
        and not tokenizer.split_special_tokens
        and not (token.lstrip or token.rstrip or token.single_word)
    )


def _split(piece: Piece, end: str) -> Iterator[Piece]:
    """The parts of `piece` between tokens `end`: tiktoken is fast where no token is in a text."""
    *before, last = piece.text.split(end)
    yield from (Piece(text, True, 0) for text in before)
    yield piece._replace(text=last)


def _take(pieces: Iterator[Piece]) -> list[Piece]:
    """The next pieces, until they have `CHARACTERS`."""
    batch: list[Piece] = []
    limit = CHARACTERS
    while limit > 0 and (piece := next(pieces, None)) is not None:
        batch.append(piece)
        limit -= len(piece.text)
    return batch


def clear_cache(cache_dir: str | os.PathLike[str] | None = None) -> int:
    """Remove the ids that `tokenize` has kept, apart from those being written; return their bytes.

    A training that runs on them fails; started again, it encodes its texts again and goes on.

    Args:
        cache_dir: as for `tokenize`.
    """
    folder, removed = CACHE if cache_dir is None else Path(cache_dir), 0
    for path in [*folder.glob("*")]:
        if name := re.fullmatch(
            r"([0-9a-f]{32})\.(ids|json|ids\.unfinished|vocabulary)", path.name
        ):
            lock = FileLock(folder / f"{name[1]}.ids.lock", timeout=0)
            with suppress(Timeout, FileNotFoundError), lock:
                size = path.stat().st_size
                path.unlink()
                removed += size
    return removed
