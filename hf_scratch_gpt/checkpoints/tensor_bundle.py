"""Read a TensorFlow V2 checkpoint without TensorFlow.

A checkpoint PREFIX is an index, `PREFIX.index`, and data shards, `PREFIX.data-00000-of-00001` and
on. The index is a sorted string table in LevelDB's format (leveldb/doc/table_format.md): blocks of
keys and values, each key sharing a prefix with the one before it. A value is a protocol buffer,
BundleEntryProto (tensorflow/core/protobuf/tensor_bundle.proto), that says where a tensor's bytes
lie.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import google_crc32c
import torch

from .sources import map_bytes

_FOOTER_SIZE = 48
_LARGEST_INDEX = 1 << 26  # that of GPT-2's largest release takes 16 thousand bytes
_MAGIC = 0xDB4775248B80FB57
# By the numbers of tensorflow/core/framework/types.proto.
_DTYPES = {1: torch.float32, 2: torch.float64, 14: torch.bfloat16, 19: torch.float16}


@dataclass
class _Entry:
    """Where a tensor lies and what it is; the field numbers are those of BundleEntryProto."""

    dtype: int = 0
    shape: list[int] = field(default_factory=list)
    shard: int = 0
    offset: int = 0
    size: int = 0
    checksum: int = 0


class TensorBundle:
    """The tensors of a checkpoint, read one at a time and checked against their checksums.

    Args:
        prefix: the path of the files without `.index`.

    Raises:
        ValueError: a file is damaged, cut short, or no TensorFlow V2 checkpoint; names file and
            tensor.
    """

    def __init__(self, prefix: Path) -> None:
        self.index_path = prefix.with_name(prefix.name + ".index")
        self._prefix = prefix
        entries = dict(_read_table(self.index_path))
        if b"" not in entries:
            raise ValueError(
                f"{self.index_path} has no header entry: it is no TensorFlow V2 checkpoint index"
            )
        header = dict(_fields(entries.pop(b""), self.index_path))
        self.num_shards = _number(header.get(1, 1), "count of shards", self.index_path)
        if header.get(2, 0) != 0:
            raise ValueError(
                f"{self.index_path} is big-endian; only little-endian checkpoints can be read"
            )
        self._entries = {
            name.decode(errors="backslashreplace"): _parse_entry(value, self.index_path)
            for name, value in entries.items()
        }
        self._checked: set[str] = set()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor by name, in the order of the index."""
        return {name: tuple(entry.shape) for name, entry in self._entries.items()}

    def dtype(self, name: str) -> torch.dtype:
        """The data type of the tensor `name`.

        Raises:
            ValueError: it is none that GPT-2's weights have.
        """
        number = self._entries[name].dtype
        if number not in _DTYPES:
            raise ValueError(
                f"{self.index_path}: {name} has TensorFlow's data type {number}; weights are "
                f"floating-point, {', '.join(map(str, _DTYPES))}"
            )
        return _DTYPES[number]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name`, mapped from its file and compared with its checksum the first time.

        Raises:
            ValueError: its bytes are missing, or do not match their checksum.
        """
        entry = self._entries[name]
        dtype = self.dtype(name)
        shard = self._prefix.with_name(
            f"{self._prefix.name}.data-{entry.shard:05d}-of-{self.num_shards:05d}"
        )
        where = f"{shard}: {name}"
        if not shard.is_file():
            raise ValueError(f"{shard} is missing, and {name} lies in it")
        expected = dtype.itemsize * prod(entry.shape)
        if entry.size != expected:
            raise ValueError(
                f"{where} has {entry.size} bytes, but its shape {entry.shape} takes {expected}"
            )
        if entry.offset + entry.size > shard.stat().st_size:
            raise ValueError(
                f"{where} ends at byte {entry.offset + entry.size}, past the file's "
                f"{shard.stat().st_size}: the file is cut short; fetch it again"
            )
        data = map_bytes(shard, entry.offset, entry.size)
        if name not in self._checked and _masked_crc(data.numpy().data) != entry.checksum:
            raise ValueError(f"{where} does not match its checksum: it is damaged; fetch it again")
        self._checked.add(name)
        return data.view(dtype).reshape(entry.shape)


_CHUNK = 1 << 20  # fits a processor's cache, since google_crc32c takes nothing but copies


def _masked_crc(data: memoryview) -> int:
    """CRC-32C, rotated and shifted as LevelDB stores it."""
    crc = 0
    for start in range(0, len(data), _CHUNK):
        crc = google_crc32c.extend(crc, bytes(data[start : start + _CHUNK]))
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _varint(data: bytes, position: int, path: Path) -> tuple[int, int]:
    """The number at `position`, seven bits a byte, and the position after it."""
    number = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise ValueError(f"{path} is damaged: a number runs past its end")


def _fields(message: bytes, path: Path) -> Iterator[tuple[int, int | bytes]]:
    """The numbered fields of a protocol buffer message."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position, path)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _varint(message, position, path)
            yield number, value
            continue
        if wire_type == 2:
            size, position = _varint(message, position, path)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(
                f"{path} is damaged: field {number} has the unknown wire type {wire_type}"
            )
        if position + size > len(message):
            raise ValueError(f"{path} is damaged: field {number} runs past the end of its message")
        piece = message[position : position + size]
        position += size
        yield number, piece if wire_type == 2 else int.from_bytes(piece, "little")


def _parse_entry(message: bytes, path: Path) -> _Entry:
    entry = _Entry()
    names = {1: "dtype", 3: "shard", 4: "offset", 5: "size", 6: "checksum"}
    for number, value in _fields(message, path):
        if number == 2 and isinstance(value, bytes):
            entry.shape = [_length(v, path) for n, v in _fields(value, path) if n == 2]
        elif number in names:
            setattr(entry, names[number], _number(value, f"{names[number]} of a tensor", path))
        elif number == 7:
            raise ValueError(f"{path} holds sliced tensors; save the checkpoint unpartitioned")
    return entry


def _length(dimension: int | bytes, path: Path) -> int:
    """The size that a message TensorShapeProto.Dim gives."""
    if not isinstance(dimension, bytes):
        raise ValueError(f"{path} is damaged: a dimension of a tensor is no message")
    return _number(dict(_fields(dimension, path)).get(1, 0), "length of a tensor", path)


def _number(value: int | bytes, what: str, path: Path) -> int:
    if not isinstance(value, int):
        raise ValueError(f"{path} is damaged: the {what} is no number")
    return value


def _read_table(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a sorted string table."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _FOOTER_SIZE))
        footer = file.read(_FOOTER_SIZE)
    if len(footer) < _FOOTER_SIZE or int.from_bytes(footer[-8:], "little") != _MAGIC:
        raise ValueError(
            f"{path} does not end like a TensorFlow V2 checkpoint index; is it the right file?"
        )
    if size > _LARGEST_INDEX:
        raise ValueError(
            f"{path} has {size} bytes; the index of a GPT-2 is smaller than {_LARGEST_INDEX}"
        )
    data = path.read_bytes()
    _, position = _varint(footer, 0, path)
    _, position = _varint(footer, position, path)
    for _, handle in _read_block(data, footer[position:], path):
        yield from _read_block(data, handle, path)


def _read_block(data: bytes, handle: bytes, path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of the block at `handle`, a pair of offset and size."""
    offset, position = _varint(handle, 0, path)
    size, _ = _varint(handle, position, path)
    block, trailer = data[offset : offset + size], data[offset + size : offset + size + 5]
    if len(block) != size or len(trailer) != 5 or size < 4:
        raise ValueError(
            f"{path} is cut short: a block of {size} bytes at {offset} runs past its end"
        )
    if _masked_crc(memoryview(block + trailer[:1])) != int.from_bytes(trailer[1:], "little"):
        raise ValueError(f"{path} does not match its checksum at byte {offset}: fetch it again")
    if trailer[0] != 0:
        raise ValueError(
            f"{path} is compressed (type {trailer[0]}); only uncompressed indexes are read"
        )
    num_restarts = int.from_bytes(block[-4:], "little")
    end = size - 4 * (num_restarts + 1)
    key, position = b"", 0
    while position < end:
        shared, position = _varint(block, position, path)
        unshared, position = _varint(block, position, path)
        length, position = _varint(block, position, path)
        if shared > len(key) or position + unshared + length > end:
            raise ValueError(
                f"{path} is damaged: an entry of the block at {offset} runs past its end"
            )
        key = key[:shared] + block[position : position + unshared]
        position += unshared
        yield key, block[position : position + length]
        position += length
