"""Memory for large tensors on a CPU: fresh pages are slow, large pages less so."""

import math
import mmap
from contextlib import suppress

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_LARGE = 2**22  # bytes; below, memory comes from what others have given back


def large_pages(size: int) -> torch.Tensor:
    """`size` bytes, all 0, (N,) of uint8, on pages of 2 MB where Linux has them.

    A virtual machine takes some microseconds for each page of 4 KB that is touched first, which can
    be more than what is then computed on it. What torch frees it gives back to the system, and
    takes it again for the next step.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # Windows, macOS
        return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel built without
        area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=torch.uint8)


def zeros(shape: tuple[int, ...], like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros where `like` is, on large pages where that saves time."""
    size = math.prod(shape) * dtype.itemsize
    is_plain = like.is_cpu and not torch.compiler.is_compiling() and not is_in_torch_dispatch_mode()
    if is_plain and size >= _LARGE:
        return large_pages(size).view(dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=like.device)
