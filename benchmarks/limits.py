"""What the machine can do at most, measured in the same run as everything else."""

import torch

from hf_scratch_gpt.engine.half import multiplied_as
from hf_scratch_gpt.engine.products import WAYS, multiply_seconds

from .timing import best_seconds

_BYTES = 2**29  # larger than any cache


@torch.no_grad()
def read_bandwidth(device: str) -> float:
    """Bytes a second at which memory is read, by the fastest way known."""
    layer = torch.nn.Linear(1024, _BYTES // 4 // 1024, bias=False, device=device)
    seconds = [best_seconds(layer.weight.sum, device)]
    if device == "cpu":
        seconds += [multiply_seconds(layer, way) for way in WAYS for _ in range(9)]
    return _BYTES / min(seconds)


@torch.no_grad()
def matrix_peak(dtype: torch.dtype, device: str, rows: int = 1024, hidden: int = 768) -> float:
    """FLOP a second of the feed-forward's product, `rows` tokens at once, in the fastest type."""
    dtype = multiplied_as(dtype) if device == "cpu" else dtype
    x = torch.randn(rows, hidden, device=device, dtype=dtype)
    weight = torch.randn(4 * hidden, hidden, device=device, dtype=dtype)
    seconds = best_seconds(lambda: torch.nn.functional.linear(x, weight), device)
    return 2 * rows * hidden * 4 * hidden / seconds
