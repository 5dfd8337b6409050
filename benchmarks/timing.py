"""Clocks, and rounds in turns."""

import statistics
import time
from collections.abc import Callable, Mapping

_ENOUGH = 120  # seconds


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
        import torch

        torch.accelerator.synchronize()


def best_seconds(work: Callable[[], object], device: str = "cpu", rounds: int = 9) -> float:
    """The shortest of several times, for limits."""
    work()
    return min(seconds_of(work, device) for _ in range(rounds))


def in_turns(
    ways: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each of `ways` in each round; a machine's slow minutes meet all of them.

    A way that has taken two minutes is not called again: on a CPU without half precision some do.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            if sum(seconds[name]) < _ENOUGH:
                seconds[name].append(seconds_of(way, device))
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
