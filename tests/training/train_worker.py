"""Run by test_train_processes.py in processes of its own: `train` with some arguments more.

Besides those of `train`, "kill" ends the process as `kill -9` would, behind a step or in the middle
of writing a file of its checkpoint; "interrupt" sends one of the processes a Ctrl-C at a step;
"history" is the file for what came of it.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback, TrainerState

from hf_scratch_gpt.training.run import train


class Kill(TrainerCallback):
    """Dies behind the step number `step`, or while that step's checkpoint is written, at `file`."""

    def __init__(self, step, file=None):
        self.step, self.file = step, file

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step < self.step:
            return
        if self.file is None:
            os.kill(os.getpid(), signal.SIGKILL)
        torch_save, save_to_json = torch.save, TrainerState.save_to_json

        def half_of(path, write):
            write(path)
            if Path(path).name == self.file:
                os.truncate(path, Path(path).stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        torch.save = lambda content, path: half_of(path, lambda path: torch_save(content, path))
        TrainerState.save_to_json = lambda state, path: half_of(
            path, lambda path: save_to_json(state, path)
        )


class Interrupt(TrainerCallback):
    """Sends the process `rank` a Ctrl-C in the step number `step`."""

    def __init__(self, step, rank):
        self.step, self.rank = step, rank

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1 and args.process_index == self.rank:
            signal.raise_signal(signal.SIGINT)


def shard_on_cpus() -> None:
    """Let accelerate take CPUs for accelerators, as it shards weights on those alone.

    `AcceleratorState.__init__` turns an fsdp plugin into `DistributedType.FSDP` for a list of kinds
    of processes that MULTI_CPU is not in. What comes after, FSDP2's sharding and its collectives,
    knows CPUs and gloo.
    """
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


def run(arguments: dict[str, Any]) -> None:
    """Train, and write down what came of it."""
    history, callbacks = Path(arguments.pop("history")), []
    if (kill := arguments.pop("kill", None)) is not None:
        callbacks.append(Kill(**kill))
    if (interrupt := arguments.pop("interrupt", None)) is not None:
        callbacks.append(Interrupt(**interrupt))
    if arguments.get("fsdp"):
        shard_on_cpus()
    result = train(**arguments, callbacks=callbacks)
    if not dist.is_initialized() or dist.get_rank() == 0:
        found = {"steps": result.steps, "from": result.went_on_from, "history": result.history}
        history.write_text(json.dumps({**found, "interrupted": result.interrupted}))
    if dist.is_initialized():
        dist.destroy_process_group()
