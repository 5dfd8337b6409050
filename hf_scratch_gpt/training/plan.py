"""What a training will take, said before it begins, and once more after ten steps."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments

from .. import sizing
from ..model.configuration_scratch_gpt import ScratchGPTConfig
from .blocks import Blocks
from .run_folder import batch_size

_MEASURED_STEPS = 10
_FEWEST, _MOST = 100_000, 1_000_000  # tokens of a validation
# Of the speed of large products, what a whole step reaches; seen between 0.3 and 0.6.
_EFFICIENCY = 0.4


def validation_limit(
    arguments: TrainingArguments, blocks: Blocks, record: dict[str, Any] | None
) -> int:
    """Tokens to validate on at most: as many as are trained on in between, within limits.

    A run that is lengthened keeps its own, which `record` has.
    """
    if record and record.get("validation"):
        return int(record["validation"][1]) * blocks.block_size
    batch = batch_size(arguments)
    epoch = math.ceil(len(blocks) / batch)
    steps = arguments.max_steps if arguments.max_steps > 0 else epoch * arguments.num_train_epochs
    every = epoch if arguments.eval_strategy == "epoch" else arguments.eval_steps or 1
    between = round(every * steps if every < 1 else every) * batch * blocks.block_size
    return min(_MOST, max(_FEWEST, between))


def describe_plan(
    model: PreTrainedModel,
    arguments: TrainingArguments,
    blocks: Blocks,
    held_out: Blocks | None,
    steps: int,
    step: int,
) -> str:
    """Parameters, tokens, steps, memory and time of a training that is at `step` of `steps`."""
    count = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size, batch = blocks.block_size, batch_size(arguments)
    parts = [
        f"{count:,} parameters"
        + (f", of which {trained:,} are trained" if trained < count else ""),
        f"{len(blocks) * size:,} tokens to train on"
        + (f", {len(held_out) * size:,} to validate on" if held_out else ""),
        f"{steps:,} steps of {batch} x {size} tokens"
        + (f", {step:,} of them done" if step else ""),
    ]
    if isinstance(model.config, ScratchGPTConfig) and trained == count:
        memory = sizing.training_memory(model.config, arguments.train_batch_size, size)
        tokens = (steps - step) * batch * size
        speed = _flops_per_second(arguments.device) * arguments.world_size
        flops = sizing.training_flops_per_token(model.config, size)
        seconds = sizing.training_seconds(flops, tokens, speed)
        parts += [f"{_bytes(memory.peak)} of memory", f"about {sizing.humanize_seconds(seconds)}"]
    return "Training: " + "; ".join(parts)


def _bytes(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def _flops_per_second(device: torch.device) -> float:
    """What `device` may sustain in training, by a product of matrices of medium size."""
    left, right = torch.randn(2, 768, 768, device=device)
    (left @ right).sum().item()
    begin, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - begin) < 0.05:
        (left @ right).sum().item()  # waits for the result
        count += 1
    return _EFFICIENCY * 2 * 768**3 * count / passed


class TimeLeft(TrainerCallback):
    """Says after ten steps how long the others will take."""

    def __init__(self, notice: Callable[[str], None]) -> None:
        self.notice = notice
        self._first, self._begin = 0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any
    ) -> None:
        self._first, self._begin = state.global_step, time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        left = state.max_steps - state.global_step
        if state.global_step == self._first + _MEASURED_STEPS and left > 0:
            passed = time.perf_counter() - self._begin
            seconds = passed / _MEASURED_STEPS * left
            self.notice(
                f"{_MEASURED_STEPS} steps took {passed:.1f} s: about "
                f"{sizing.humanize_seconds(seconds)} to go, validation apart"
            )
