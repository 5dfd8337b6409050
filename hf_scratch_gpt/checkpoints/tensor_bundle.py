"""Read a TensorFlow V2 checkpoint without TensorFlow.

A checkpoint PREFIX is an index, `PREFIX.index`, and data shards, `PREFIX.data-00000-of-00001` and
on. The index is a sorted string table in LevelDB's format (leveldb/doc/table_format.md): blocks of
keys and values, each key sharing a prefix with the one before it. A value is a protocol buffer,
BundleEntryProto (tensorflow/core/protobuf/tensor_bundle.proto), that says where a tensor's bytes
lie.
"""

from collections.abc import Iterator
from functools import partial
from math import prod
from operator import index
from pathlib import Path
from typing import Any

import google_crc32c
import torch

from .sources import StoredTensor, map_tensor

_FOOTER_SIZE = 48
_LARGEST_INDEX = 1 << 20  # that of GPT-2's largest release takes 16 thousand bytes
_LONGEST_NAME = 512
_MAGIC = 0xDB4775248B80FB57
_CHUNK = 1 << 20  # fits a processor's cache, since google_crc32c takes nothing but copies
# By the numbers of tensorflow/core/framework/types.proto.
_DTYPES = {1: torch.float32, 2: torch.float64, 14: torch.bfloat16, 19: torch.float16}


def read_bundle(prefix: Path) -> list[StoredTensor]:
    """The tensors of the checkpoint `prefix`, which are compared with their checksums when read.

    A ValueError names the file, and the tensor, that is damaged or cut short.
    """
    path = prefix.with_name(prefix.name + ".index")
    data = _index_bytes(path)
    try:
        values = dict(read_table(data))
        header = _fields(values.pop(b""))
        num_shards, is_big_endian = _number(header, 1, default=1), _number(header, 2)
        entries = {name: _entry(value) for name, value in values.items()}
    except (LookupError, TypeError):  # past an end, or of another type
        raise ValueError(
            f"{path} is damaged: it does not follow the format of an index; fetch it again"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    if is_big_endian:
        raise ValueError(f"{path} is big-endian; only little-endian checkpoints can be read")
    tensors = []
    for key, (shape, kind, shard, *place) in entries.items():
        name = key.decode(errors="backslashreplace")
        if kind not in _DTYPES:
            allowed = f"weights have one of {sorted(_DTYPES)}"
            raise ValueError(f"{path}: {name} has TensorFlow's data type {kind}; {allowed}")
        file = prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{num_shards:05d}")
        read = partial(_read, f"{file}: {name}", file, shape, _DTYPES[kind], *place)
        tensors.append(StoredTensor(name, str(file), shape, _DTYPES[kind], read))
    return tensors


def _read(
    where: str, file: Path, shape: tuple[int, ...], dtype: torch.dtype, *place: int
) -> torch.Tensor:
    """A tensor, mapped from `file` at offset, size and checksum `place`, and checked."""
    offset, size, checksum = place
    if not file.is_file():
        raise ValueError(f"{where} lies in a file that is missing")
    if size != dtype.itemsize * prod(shape):
        raise ValueError(f"{where} has {size} bytes, which are not those of shape {list(shape)}")
    if (end := offset + size) > (length := file.stat().st_size):
        message = f"{where} ends at byte {end}, past the file's {length}: the file is cut short"
        raise ValueError(f"{message}; fetch it again")
    tensor = map_tensor(file, offset, shape, dtype)
    if _masked_crc(tensor.reshape(-1).view(torch.uint8).numpy().data) != checksum:
        raise ValueError(f"{where} does not match its checksum: it is damaged; fetch it again")
    return tensor


def _index_bytes(path: Path) -> bytes:
    """The content of the index `path`."""
    if not path.is_file():
        raise ValueError(f"{path} is missing, or is not a file")
    if (size := path.stat().st_size) > _LARGEST_INDEX:
        limit = f"the index of a GPT-2 is smaller than {_LARGEST_INDEX}"
        raise ValueError(f"{path} has {size} bytes; {limit}")
    data = path.read_bytes()
    if size < _FOOTER_SIZE or int.from_bytes(data[-8:], "little") != _MAGIC:
        raise ValueError(f"{path} does not end like the index of a TensorFlow V2 checkpoint")
    return data


# What follows raises an IndexError where data ends too early, and a TypeError where bytes stand in
# the place of a number or the other way round.


def read_table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a sorted string table."""
    footer = data[-_FOOTER_SIZE:]
    _, position = _varint(footer, 0)  # the first handle is of another block
    _, position = _varint(footer, position)
    handles = [handle for _, handle in _block(data, footer[position:])]
    sizes = (_varint(handle, _varint(handle, 0)[1])[0] for handle in handles)
    if sum(sizes) > len(data):
        raise ValueError("has blocks that lie in one another: it is damaged")
    for handle in handles:
        yield from _block(data, handle)


def _block(data: bytes, handle: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of the block at `handle`, a pair of offset and size."""
    offset, position = _varint(handle, 0)
    size, _ = _varint(handle, position)
    block, trailer = data[offset : offset + size], data[offset + size : offset + size + 5]
    if len(trailer) != 5 or size < 4:
        raise IndexError
    if _masked_crc(memoryview(block + trailer[:1])) != int.from_bytes(trailer[1:], "little"):
        raise ValueError(f"does not match its checksum at byte {offset}: fetch it again")
    if trailer[0] != 0:
        raise ValueError(f"is compressed (type {trailer[0]}); only uncompressed indexes are read")
    end = size - 4 * (int.from_bytes(block[-4:], "little") + 1)
    key, position = b"", 0
    while position < end:
        shared, position = _varint(block, position)
        unshared, position = _varint(block, position)
        length, position = _varint(block, position)
        if shared > len(key) or position + unshared + length > end:
            raise IndexError
        if shared + unshared > _LONGEST_NAME:
            raise ValueError(f"has a name of {shared + unshared} bytes, over {_LONGEST_NAME}")
        key = key[:shared] + block[position : position + unshared]
        position += unshared + length
        yield key, block[position - length : position]


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at `position`, seven bits a byte, and the position after it."""
    number = 0
    for count in range(10):
        byte = data[position + count]
        number |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return number, position + count + 1
    raise IndexError


def _fields(message: Any) -> dict[int, list[Any]]:
    """The values, bytes or numbers, of a protocol buffer message by the numbers of its fields."""
    fields: dict[int, list[Any]] = {}
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = divmod(key, 8)
        if wire_type in (0, 2):  # a number, or how many bytes follow
            value, position = _varint(message, position)
        if wire_type != 0:
            start, size = position, value if wire_type == 2 else {1: 8, 5: 4}[wire_type]
            position += size
            if position > len(message):
                raise IndexError
            piece = message[start:position]
            value = piece if wire_type == 2 else int.from_bytes(piece, "little")
        fields.setdefault(number, []).append(value)
    return fields


def _entry(message: bytes) -> tuple[Any, ...]:
    """Shape, data type, shard, offset, size and checksum, of a BundleEntryProto."""
    fields = _fields(message)
    if 7 in fields:
        raise ValueError("holds sliced tensors; save the checkpoint unpartitioned")
    dimensions = [dim for shape in fields.get(2, []) for dim in _fields(shape).get(2, [])]
    shape = tuple(_number(_fields(dimension), 1) for dimension in dimensions)
    return shape, *(_number(fields, number) for number in (1, 3, 4, 5, 6))


def _number(fields: dict[int, list[Any]], number: int, default: int = 0) -> int:
    return index(fields.get(number, [default])[-1])


def _masked_crc(data: memoryview) -> int:
    """CRC-32C, rotated and shifted as LevelDB stores it."""
    crc = 0
    for start in range(0, len(data), _CHUNK):
        crc = google_crc32c.extend(crc, bytes(data[start : start + _CHUNK]))
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
