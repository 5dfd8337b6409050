"""Processes that have imported everything already: forks of one that does nothing else."""

import multiprocessing
import os
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["accelerate", "hf_scratch_gpt.training.run"])


@dataclass
class Started:
    """Processes that run at once, and the file that has what they print."""

    processes: Sequence[ForkServerProcess]
    output: Path

    def wait(self) -> tuple[list[int | None], str]:
        """Their exit statuses, -9 for one that was killed, and what they printed."""
        for process in self.processes:
            process.join(300)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes, self.output.read_text()


def start(output: Path, count: int, call: Callable[..., int | None], *arguments: Any) -> Started:
    """Call `call(*arguments)` in `count` processes of one group, as torchrun would start them.

    What it returns is the exit status; all they print goes to `output`.
    """
    output.write_text("")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(count))
    group["LOCAL_WORLD_SIZE"] = str(count)
    processes = []
    for rank in range(count):
        place = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
        processes.append(_CONTEXT.Process(target=_run, args=(output, place, call, arguments)))
        processes[-1].start()
    return Started(processes, output)


def _run(
    output: Path, place: dict[str, str], call: Callable[..., int | None], arguments: Sequence[Any]
) -> None:
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    sys.stdout.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(place)
    warnings.simplefilter("error")
    sys.exit(call(*arguments))
