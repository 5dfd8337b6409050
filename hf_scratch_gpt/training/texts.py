"""Files and data sets -> the texts in them, piece by piece.

Texts are checked while they are read: an error names the file, and the line or byte in it.
"""

import codecs
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ..model.bpe_scratch_gpt import mended

Sources = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
JSON_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, ".parquet")

# How much of a text file is held in memory, in bytes.
PIECE_BYTES = 1 << 20

_INSTALL = "pip install 'hf_scratch_gpt[train]'"


class Piece(NamedTuple):
    """A document, or a part of a long one.

    `ends` says that the document ends here, `size` how many bytes of its source were read for it.
    """

    text: str
    ends: bool
    size: float


def find(sources: Sources) -> list[Any]:
    """The files, as paths, and the data sets that `sources` name.

    Args:
        sources: one or several of: a text file (one document; .txt, .text, .md, .rst), JSON lines
            (one document a line; .jsonl, .ndjson), a Parquet file, a folder (all such files below
            it, in the order of their names), or the name of a data set for
            `datasets.load_dataset`, with its configuration after a colon, of which the split
            "train" is read.

    Raises:
        ValueError: a source is missing.
        ImportError: a source needs a package that is not installed.
    """
    if isinstance(sources, (str, os.PathLike)):
        sources = [sources]
    found: list[Any] = []
    for source in sources:
        path = Path(source)
        if path.is_dir() and source != "":
            found += _files_below(path)
        elif path.is_file():
            if path.suffix.lower() not in SUFFIXES:
                raise ValueError(
                    f"{path} ends in {path.suffix!r}, but a file of texts ends in "
                    f"{' or '.join(SUFFIXES)}; rename it to say what it holds"
                )
            found.append(path)
        else:
            found.append(_load_dataset(str(source)))
    if not found:
        raise ValueError("no source was given; name a file, a folder or a data set")
    return found


def _files_below(folder: Path) -> list[Path]:
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise ValueError(f"{folder} has no file below it that ends in {' or '.join(SUFFIXES)}")
    return files


def _load_dataset(source: str) -> Any:
    name, _, configuration = source.partition(":")
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or not name
    if looks_like_path or Path(source).suffix.lower() in SUFFIXES:
        what = "is neither a file nor a folder" if os.path.lexists(source) else "does not exist"
        raise ValueError(f"{source!r} {what}; name a file, a folder or a data set")
    try:
        import datasets  # type: ignore[import-untyped]  # it has no stubs
    except ImportError:
        raise ImportError(f"{source} is not a file, and a data set needs `{_INSTALL}`") from None
    try:
        return datasets.load_dataset(name, configuration or None, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{source} is not a file or folder, and cannot be loaded as a data set: {reason}"
        ) from None


def size_of(source: Any) -> int:
    """Bytes to read of a source that `find` returned."""
    return source.stat().st_size if isinstance(source, Path) else source.dataset_size or 0


def read(source: Any, field: str) -> Iterator[Piece]:
    """The texts of a source that `find` returned, in pieces that fit in memory.

    In JSON lines, Parquet and data sets they are in the field or column `field`. A ValueError says
    that the source is empty, not UTF-8 or damaged, or has no such field.
    """
    if not isinstance(source, Path):
        name, pieces = f"data set {source.info.dataset_name}", _dataset_pieces(source, field)
    elif source.suffix.lower() in TEXT_SUFFIXES:
        name, pieces = str(source), _text_pieces(source)
    elif source.suffix.lower() in JSON_SUFFIXES:
        name, pieces = str(source), _json_pieces(source, field)
    else:
        name, pieces = str(source), _parquet_pieces(source, field)
    is_empty = True
    for piece in pieces:
        is_empty = is_empty and not piece.text
        yield piece
    if is_empty:
        raise ValueError(f"{name} is empty; leave it out")


def _text_pieces(path: Path) -> Iterator[Piece]:
    text = ""
    with path.open("rb") as file:
        for more, size in _decoded(path, iter(lambda: file.read(PIECE_BYTES), b"")):
            text += more
            cut = _place_to_cut(text) if size else len(text)
            yield Piece(text[:cut], size == 0, size)
            text = text[cut:]


def _place_to_cut(text: str) -> int:
    """Where to cut `text` so that its parts are encoded as the whole is.

    Byte-level BPE never joins a word and the white space after it.
    """
    for space in "\n ":
        place = text.rfind(space)
        while place > 0 and text[place - 1].isspace():
            place = text.rfind(space, 0, place)
        if place > 0:
            return place
    return len(text)


def _decoded(path: Path, chunks: Iterable[bytes]) -> Iterator[tuple[str, int]]:
    """The text and the size in bytes of each of `chunks`, and an empty one of size 0 at the end."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    for data in chain(chunks, [b""]):
        waiting = len(decoder.getstate()[0])  # bytes of a character that is not yet complete
        try:
            text, bad = decoder.decode(data, final=not data), data.find(0)
        except UnicodeDecodeError as error:
            offset, data, bad = offset - waiting, error.object, error.start
        if bad >= 0:
            raise ValueError(
                f"{path} is not UTF-8 text: byte {offset + bad} is {data[bad]:#04x}; convert the "
                "file or leave it out"
            )
        yield text if offset else text.removeprefix("\ufeff"), len(data)
        offset += len(data)


def _json_pieces(path: Path, field: str) -> Iterator[Piece]:
    with path.open("rb") as file:
        for number, (line, size) in enumerate(_decoded(path, file), start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where} is not JSON ({error.msg}, column {error.colno}); a line holds one "
                    "object"
                ) from None
            except RecursionError:
                raise ValueError(f"{where} is nested too deeply; is it the right file?") from None
            if not isinstance(record, dict):
                raise ValueError(f"{where} is not a JSON object: {line.strip()[:40]}")
            if not isinstance(record.get(field), str):
                names = _listed(record)
                raise ValueError(f"{where} has no text in field {field!r}; it has {names}")
            yield Piece(mended(record[field]), bool(record[field]), size)


def _parquet_pieces(path: Path, field: str) -> Iterator[Piece]:
    try:
        import pyarrow  # type: ignore[import-untyped]  # it has no stubs
        from pyarrow import parquet
    except ImportError:
        raise ImportError(f"{path}: a Parquet file needs `{_INSTALL}`") from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = {column.name: str(column.type) for column in file.schema_arrow}
            if columns.get(field) not in ("string", "large_string"):
                raise ValueError(
                    f"{path} has no text in column {field!r}; it has {_listed(columns)}"
                )
            size = path.stat().st_size / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for text in batch[field].to_pylist():
                    yield Piece(text or "", bool(text), size)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged, or is not a Parquet file: {error}") from None


def _dataset_pieces(dataset: Any, field: str) -> Iterator[Piece]:
    if field not in dataset.column_names:
        raise ValueError(
            f"the data set has no column {field!r}; it has {_listed(dataset.column_names)}"
        )
    size = size_of(dataset) / max(1, len(dataset))
    for batch in dataset.select_columns([field]).iter(256):
        for text in batch[field]:
            yield Piece(mended(text) or "", bool(text), size)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
