"""Files and data sets -> the texts in them, piece by piece.

Texts are checked while they are read: what is wrong with one is said with its file, and the line or
byte.
"""

import codecs
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..model.bpe_scratch_gpt import mended

Sources = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
JSON_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)
SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, *PARQUET_SUFFIXES)

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


def documents(sources: Sources, text_field: str = "text") -> Iterator[Piece]:
    """Read the texts of `sources`, in pieces that fit in memory; empty documents are left out.

    Args:
        sources: one or several of: a text file (one document; .txt, .text, .md, .rst), JSON lines
            (one document a line; .jsonl, .ndjson), a Parquet file, a folder (all such files below
            it, in the order of their names), or the name of a data set for
            `datasets.load_dataset`, with its configuration behind a colon, of which the split
            "train" is read.
        text_field: name of the field or column with the text.

    Raises:
        ValueError: a source is missing, empty, not UTF-8 or damaged.
        ImportError: a source needs a package that is not installed.
    """
    for source in find(sources):
        yield from read(source, text_field)


def find(sources: Sources) -> list[Any]:
    """The files, as paths, and data sets that `sources` name; see `documents`."""
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
                    f"{path} ends in {path.suffix!r}, and a file to train on ends in "
                    f"{' or '.join(SUFFIXES)}; rename it to say what it holds"
                )
            found.append(path)
        else:
            found.append(_load_dataset(str(source)))
    if not found:
        raise ValueError("there is no source; name a file, a folder or a data set")
    return found


def _files_below(folder: Path) -> list[Path]:
    files = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise ValueError(f"{folder} has no file below it that ends in {' or '.join(SUFFIXES)}")
    return sorted(files)


def _load_dataset(source: str) -> Any:
    name, _, configuration = source.partition(":")
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or not name
    if looks_like_path or Path(source).suffix.lower() in SUFFIXES:
        raise ValueError(f"{source!r} does not exist; name a file, a folder or a data set")
    try:
        import datasets  # type: ignore[import-untyped]  # it has no stubs
    except ImportError:
        raise ImportError(f"{source} is no file, and a data set needs `{_INSTALL}`") from None
    try:
        return datasets.load_dataset(name, configuration or None, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{source} is no file and no folder, and cannot be loaded as a data set: {reason}"
        ) from None


def size_of(source: Any) -> int:
    """Bytes that reading a source of `find` takes."""
    return source.stat().st_size if isinstance(source, Path) else source.dataset_size or 0


def read(source: Any, field: str) -> Iterator[Piece]:
    """The pieces of a source of `find`; see `documents`."""
    if not isinstance(source, Path):
        name, pieces = f"data set {source.info.dataset_name}", _dataset_pieces(source, field)
    elif source.suffix.lower() in PARQUET_SUFFIXES:
        name, pieces = str(source), _parquet_pieces(source, field)
    elif source.suffix.lower() in JSON_SUFFIXES:
        name, pieces = str(source), _json_pieces(source, field)
    else:
        name, pieces = str(source), _text_pieces(source)
    empty = True
    for piece in pieces:
        empty = empty and not piece.text
        yield piece
    if empty:
        raise ValueError(f"{name} is empty; leave it out")


def _text_pieces(path: Path) -> Iterator[Piece]:
    text, rest, offset = "", b"", 0
    with path.open("rb") as file:
        while data := file.read(PIECE_BYTES):
            more, rest = _decode(path, rest + data, offset - len(rest), final=False)
            text += more if offset else more.removeprefix("\ufeff")
            offset += len(data)
            cut = _place_to_cut(text)
            yield Piece(text[:cut], False, len(data))
            text = text[cut:]
    _decode(path, rest, offset - len(rest), final=True)
    yield Piece(text, offset > 0, 0)


def _place_to_cut(text: str) -> int:
    """Where to cut `text` so that its parts are encoded as the whole is.

    Byte-level BPE never joins a word and the white space behind it.
    """
    for space in "\n ":
        place = text.rfind(space)
        while place > 0 and text[place - 1].isspace():
            place = text.rfind(space, 0, place)
        if place > 0:
            return place
    return len(text)


def _decode(path: Path, data: bytes, offset: int, final: bool) -> tuple[str, bytes]:
    """Decode `data`, which begins at byte `offset` of the file; return the text and the rest."""
    text, used = "", 0
    try:
        text, used = codecs.utf_8_decode(data, "strict", final)
        place = data.find(0)
    except UnicodeDecodeError as error:
        place = error.start
    if place >= 0:
        raise ValueError(
            f"{path} is not UTF-8 text: byte {offset + place} is {data[place]:#04x}; convert the "
            "file or leave it out"
        )
    return text, data[used:]


def _json_pieces(path: Path, field: str) -> Iterator[Piece]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text, _ = _decode(path, line, offset, final=True)
            text = text if offset else text.removeprefix("\ufeff")
            offset += len(line)
            if text.strip():
                document = _field_of(text, field, f"{path}, line {number}")
                yield Piece(document, bool(document), len(line))


def _field_of(line: str, field: str, where: str) -> str:
    """The text in a line of JSON."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where} is not JSON ({error.msg}, column {error.colno}); a line holds one object"
        ) from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply; is it the right file?") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} is no JSON object: {line.strip()[:40]}")
    if not isinstance(record.get(field), str):
        raise ValueError(f"{where} has no text in field {field!r}; it has {_listed(record)}")
    return mended(record[field])


def _parquet_pieces(path: Path, field: str) -> Iterator[Piece]:
    try:
        import pyarrow  # type: ignore[import-untyped]  # it has no stubs
        from pyarrow import parquet
    except ImportError:
        raise ImportError(f"{path}: a Parquet file needs `{_INSTALL}`") from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = {column.name: column.type for column in file.schema_arrow}
            kind = columns.get(field)
            if kind is None or not (
                pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
            ):
                raise ValueError(
                    f"{path} has no text in column {field!r}; it has {_listed(columns)}"
                )
            size = path.stat().st_size / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for text in batch.column(0).to_pylist():
                    yield Piece(text or "", bool(text), size)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no Parquet file, or a damaged one: {error}") from None


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
