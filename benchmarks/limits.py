"""What the machine can do at most, measured in the same run as everything else."""

import torch

from hf_scratch_gpt.linear_scratch_gpt import written_out

from .timing import best_seconds

_BYTES = 2**29  # larger than any cache


@torch.no_grad()
def read_bandwidth(device: str) -> float:
    """Bytes a second at which memory is read: the better of a sum and a compiled product."""
    numbers = torch.randn(_BYTES // 4 // 1024, 1024, device=device)
    vector = torch.randn(1, 1024, device=device)
    compiled = torch.compile(written_out, dynamic=False)
    compiled(vector, numbers, None)
    ways = (numbers.sum, lambda: compiled(vector, numbers, None))
    return _BYTES / min(best_seconds(way, device) for way in ways)


@torch.no_grad()
def matrix_peak(dtype: torch.dtype, device: str, rows: int = 1024, hidden: int = 768) -> float:
    """FLOP a second of the feed-forward's product, `rows` tokens at once."""
    x = torch.randn(rows, hidden, device=device, dtype=dtype)
    weight = torch.randn(4 * hidden, hidden, device=device, dtype=dtype)
    seconds = best_seconds(lambda: torch.nn.functional.linear(x, weight), device)
    return 2 * rows * hidden * 4 * hidden / seconds
