"""Read what `torch.save` wrote, one tensor at a time, without running code in it.

It is a zip archive of a pickle, `data.pkl`, which says what tensors there are, and of a member
`data/KEY` for each storage that they lie in. Before PyTorch 1.6 it was five pickles in a row (magic
number, version, machine, content, keys of the storages) with the storages behind them. torch's own
reader is not asked: in one archive it may see another directory than Python does.
"""

import zipfile
import zlib
from functools import partial
from io import BytesIO, FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch

from .records import Record, Storage, View, unpickle
from .sources import StoredTensor, map_tensor, told_as_error

_LARGEST_PIECE = 1 << 22  # of a directory or a pickle; those of GPT-2's largest size take a tenth
_MAGIC = 0x1950A86A20F9469CFC6C  # of files from before PyTorch 1.6


class _Bounded(FileIO):
    """A file that gives no large pieces at a time, since zipfile reads a directory as one."""

    def read(self, size: int | None = -1) -> bytes:
        if (size or 0) > _LARGEST_PIECE:
            raise ValueError(f"a piece of it has {size} bytes, more than {_LARGEST_PIECE}")
        return super().read(_LARGEST_PIECE if size is None or size < 0 else size)


def is_archive(path: str | Path) -> bool:
    """Whether the file `path` begins like a zip archive."""
    with Path(path).open("rb") as file:
        return file.read(4) == b"PK\3\4"


def plain_content(path: Path) -> Any:
    """What the pickle `path` holds, of dictionaries, lists, numbers and texts."""
    with told_as_error(path), _Bounded(path) as file:
        return unpickle(BytesIO(file.read()), {})


class Pickle:
    """A file of `torch.save`, whose tensors are mapped into memory when they are read.

    `content` is what was saved. In it, `View`s stand for tensors, and `Record`s for objects of
    other classes.

    Raises:
        ValueError: it is not such a file, or is damaged; names it.
    """

    content: Any

    def __init__(self, path: str) -> None:
        self.path = path
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is missing, or is not a file")
        # Where each storage begins, its bytes, and its CRC-32 until that was compared.
        self._places: dict[str, tuple[int, int, int | None]] = {}
        read = self._read_archive if is_archive(path) else self._read_pickles
        with told_as_error(f"{path} is not a file of tensors by torch.save"):
            read()

    def _read_archive(self) -> None:
        with _Bounded(self.path) as file, zipfile.ZipFile(file) as archive:
            members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
            if "data.pkl" not in members:
                raise ValueError("it lacks data.pkl")
            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                raise ValueError("it is big-endian")
            for name, member in members.items():
                if name != "data.pkl" and not name.startswith("data/"):
                    continue
                if member.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{member.filename} is compressed, and torch.save stores")
                file.seek(member.header_offset + 26)
                lengths = memoryview(file.read(4)).cast("H")  # of a name and extra fields
                start = member.header_offset + 30 + sum(lengths)
                self._places[name.removeprefix("data/")] = (start, member.file_size, member.CRC)
            self.content = unpickle(BytesIO(archive.read(members["data.pkl"])), {})

    def _read_pickles(self) -> None:
        storages: dict[str, Storage] = {}
        with Path(self.path).open("rb") as file:
            head = BytesIO(file.read(_LARGEST_PIECE))
            if unpickle(head, {}) != _MAGIC:
                raise ValueError("it begins otherwise")
            _, machine = unpickle(head, {}), unpickle(head, {})
            if not machine["little_endian"]:
                raise ValueError("it is big-endian")
            self.content, keys = unpickle(head, storages), unpickle(head, {})
            start = head.tell()
            for key in keys:
                file.seek(start)
                length = int.from_bytes(file.read(8), "little")
                start, size = start + 8, length * storages[key].dtype.itemsize
                self._places[key] = (start, size, None)
                start += size

    def tensors(self, key: str | None = None) -> list[StoredTensor]:
        """The tensors of the state dict that the file holds, or holds as its entry `key`."""
        state = self.content if key is None else self.content[key]
        if not isinstance(state, dict):
            raise ValueError(f"{self.path} holds no state dict")
        stored = [self._stored(name, view) for name, view in state.items()]
        size = Path(self.path).stat().st_size
        taken = sum(prod(tensor.shape) * tensor.dtype.itemsize for tensor in stored)
        if taken > 2 * size:  # tied weights are stored once
            raise ValueError(f"{self.path} has {size} bytes, and its tensors would take {taken}")
        return stored

    def _stored(self, name: Any, view: Any) -> StoredTensor:
        where = f"{self.path}: {name}"
        if not isinstance(name, str) or not isinstance(view, View):
            kind = view.name if isinstance(view, Record) else type(view).__name__.lower()
            raise ValueError(f"{where} is a {kind}; a state dict has dense tensors by name")
        _, size, _ = self._places.get(view.storage.key, (0, -1, None))
        if size != view.storage.length * view.storage.dtype.itemsize or not view.fits(size):
            raise ValueError(f"{where} does not fit its storage of {size} bytes: it is damaged")
        return StoredTensor(name, self.path, view.shape, view.dtype, partial(self._read, view))

    def _read(self, view: View) -> torch.Tensor:
        key = view.storage.key
        start, size, checksum = self._places[key]
        data = map_tensor(self.path, start, (size,), torch.uint8)
        if checksum is not None and zlib.crc32(data.numpy().data) != checksum:
            raise ValueError(
                f"{self.path}: storage {key} does not match its checksum: it is damaged"
            )
        self._places[key] = (start, size, None)
        whole = data[: size - size % view.dtype.itemsize].view(view.dtype)
        return whole.as_strided(view.shape, view.stride, view.offset)
