"""Weights in large pages of memory: a processor that reads them all has fewer pages to look up."""

import mmap
from collections.abc import Iterable

import torch

_PAGE = 2**21  # bytes; what Linux calls a huge page
_ALIGNMENT = 64


def move_to_large_pages(parameters: Iterable[torch.Tensor]) -> None:
    """Move the numbers of `parameters`, on a CPU, side by side into new memory, in large pages.

    They stay the same objects with the same numbers. Nothing happens where the system has no large
    pages or not so much memory; a parameter that other processes see, that is not contiguous or
    made in inference mode stays where it is.
    """
    # Once for all that share their numbers, as tied weights may.
    places: dict[tuple[object, ...], list[torch.Tensor]] = {}
    for parameter in parameters:
        is_fixed = parameter.is_shared() or parameter.is_inference()
        if parameter.is_contiguous() and not is_fixed and parameter.numel():
            key = parameter.data_ptr(), parameter.shape, parameter.dtype
            places.setdefault(key, []).append(parameter)
    region = _large_pages(sum(_room(group[0]) for group in places.values()) + _PAGE)
    if region is None:
        return
    start = torch.frombuffer(region, dtype=torch.uint8).data_ptr()
    offset = -start % _PAGE
    for first, *others in places.values():
        with torch.inference_mode(False):
            moved = torch.frombuffer(region, dtype=first.dtype, count=first.numel(), offset=offset)
            moved = moved.view(first.shape).copy_(first.detach())
        for parameter in (first, *others):
            parameter.data = moved
        offset += _room(first)


def _room(tensor: torch.Tensor) -> int:
    """Bytes from the start of `tensor` to the start of the next one."""
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _large_pages(size: int) -> mmap.mmap | None:
    """So many bytes of memory, freed with the last tensor that lies there."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        region.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # no memory, or a Linux without them
        return None
    return region
