"""Clocks, rounds in turns, and what the machine can do at most, measured in the same run."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from hf_scratch_gpt.engine.half import multiplied_as
from hf_scratch_gpt.engine.products import WAYS, multiply_seconds

_ENOUGH = 40  # seconds
_BYTES = 2**29  # larger than any cache


def seconds_of(work: Callable[[], object], device: str = "cpu") -> float:
    """How long `work` takes, what it leaves to a GPU included."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device != "cpu":
        torch.accelerator.synchronize()


def best_seconds(work: Callable[[], object], device: str) -> float:
    """The shortest of several times, for limits."""
    work()
    return min(seconds_of(work, device) for _ in range(9))


def in_turns(
    ways: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each of `ways` in each round; a machine's slow minutes meet all of them.

    No round begins after 40 seconds, and only the first has those that take twice as long as the
    shortest.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    start = time.perf_counter()
    quick = list(ways)
    for _ in range(rounds):
        for name in quick:
            seconds[name].append(seconds_of(ways[name], device))
        if time.perf_counter() - start > _ENOUGH:
            break
        shortest = min(min(times) for times in seconds.values())
        quick = [name for name in quick if min(seconds[name]) < 2 * shortest]
    return seconds


def rates(amount: float, seconds: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """`amount` a second: the median of the rounds, the lowest and the highest."""
    return {
        name: {
            "median": amount / statistics.median(times),
            "lowest": amount / max(times),
            "highest": amount / min(times),
        }
        for name, times in seconds.items()
    }


@functools.cache
@torch.no_grad()
def read_bandwidth(device: str) -> float:
    """Bytes a second at which memory is read, by the fastest way known."""
    layer = torch.nn.Linear(1024, _BYTES // 4 // 1024, bias=False, device=device)
    seconds = [best_seconds(layer.weight.sum, device)]
    if device == "cpu":
        seconds += [multiply_seconds(layer, way) for way in WAYS for _ in range(9)]
    return _BYTES / min(seconds)


@functools.cache
@torch.no_grad()
def matrix_peak(dtype: torch.dtype, device: str) -> float:
    """FLOP a second of GPT-2's feed-forward product, 1,024 tokens at once, in the fastest type."""
    dtype = multiplied_as(dtype) if device == "cpu" else dtype
    x = torch.randn(1024, 768, device=device, dtype=dtype)
    weight = torch.randn(4 * 768, 768, device=device, dtype=dtype)
    seconds = best_seconds(lambda: torch.nn.functional.linear(x, weight), device)
    return 2 * 1024 * weight.numel() / seconds
