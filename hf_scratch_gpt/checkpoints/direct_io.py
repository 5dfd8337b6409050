"""Read and write large files past the system's page cache.

What is written once gains nothing from the cache: it costs a copy of every byte and drives out what
others keep there; and what is read back from it tells nothing of the disk. Linux leaves the cache
out for files opened with O_DIRECT (open(2)), if memory, places and sizes are whole pages. Where
that cannot be had, reading and writing go through the cache as usual.
"""

import errno
import io
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path

import torch

_PAGE = max(4096, mmap.PAGESIZE)
_BLOCK = 4096 * _PAGE  # bytes written at a time


class DirectFile:
    """A new file, written in order; it is on the disk when it is closed."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0, opener=_open)  # noqa: SIM115
        self._block = _pages(_BLOCK)
        self._filled = 0  # bytes of the block
        self._size = 0  # bytes in all

    def write(self, data: torch.Tensor) -> None:
        """Append the bytes `data`, (N,) of uint8."""
        self._size += len(data)
        while len(data):
            taken = min(len(data), _BLOCK - self._filled)
            self._block[self._filled : self._filled + taken].copy_(data[:taken])
            data = data[taken:]
            self._filled += taken
            if self._filled == _BLOCK:
                self._flush()

    def _flush(self) -> None:
        """Write what is in the block, up to the end of its last page."""
        rest = self._block[: -(-self._filled // _PAGE) * _PAGE].numpy().data
        while rest:
            with _cache_where_needed(self._file):
                rest = rest[self._file.write(rest) :]
        self._filled = 0

    def close(self) -> None:
        """Write the rest; do nothing if that is done."""
        if self._file.closed:
            return
        with self._file:
            self._flush()
            self._file.truncate(self._size)
            os.fsync(self._file.fileno())


def read_tensor(
    path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """The contiguous tensor at byte `offset` of the file `path`.

    Raises:
        ValueError: the file ends before.
    """
    size = prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    before = offset % _PAGE
    block = _pages(before + size)
    with open(path, "rb", buffering=0, opener=_open) as file:
        file.seek(offset - before)
        filled, taken = 0, _PAGE
        while taken and taken % _PAGE == 0 and filled < before + size:
            with _cache_where_needed(file):
                taken = file.readinto(block[filled:].numpy().data)
                filled += taken
    if filled < before + size:
        raise ValueError(f"{path} ends at {offset - before + filled}, inside a tensor")
    count = prod(shape)
    return torch.frombuffer(block.numpy(), dtype=dtype, count=count, offset=before).view(shape)


def _open(path: str, flags: int) -> int:
    """Open `path` without the cache, or with it where there is no other way."""
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


@contextmanager
def _cache_where_needed(file: io.FileIO) -> Iterator[None]:
    """Let `file` go through the cache from now on if its system refuses to do without."""
    try:
        yield
    except OSError as error:
        direct = getattr(os, "O_DIRECT", 0)
        if error.errno != errno.EINVAL or not direct:
            raise
        import fcntl

        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        if not flags & direct:
            raise
        fcntl.fcntl(file, fcntl.F_SETFL, flags & ~direct)


def _pages(size: int) -> torch.Tensor:
    """Whole pages of memory, `size` bytes at least, (N,) of uint8."""
    size = -(-max(size, 1) // _PAGE) * _PAGE
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # Windows, macOS
        return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel built without
        area.madvise(mmap.MADV_HUGEPAGE)  # one page fault in place of 512
    return torch.frombuffer(area, dtype=torch.uint8)
