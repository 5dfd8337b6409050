"""What goes on beside the steps of training: evaluation, the curve, samples, a clean stop."""

import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import (
    EvalPrediction,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

from ..files import new_file
from ..writing import write
from .run_folder import CURVE

logger = logging.get_logger(__name__)


def losses_of_rows(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean loss of each row, (B,), in nats per token, from (B, T, V) and (B, T)."""
    # All rows at once would take the memory of the logits twice more.
    rows = zip(logits, labels, strict=True)
    return torch.stack([F.cross_entropy(row[:-1].float(), ids[1:]) for row, ids in rows])


class RunningLoss:
    """The mean of the rows' losses and its exponential, a batch at a time; a `compute_metrics`.

    A mean over rows is the same for any batch size and any number of processes. The Trainer's own,
    which this replaces, counts the rows twice that fill up the last batch.
    """

    def __init__(self) -> None:
        self._total, self._rows = 0.0, 0

    def __call__(self, evaluated: EvalPrediction, compute_result: bool) -> dict[str, float]:
        """Add a batch; after the last one, return what was asked for and begin anew."""
        self._total += float(evaluated.predictions.double().sum())
        self._rows += len(evaluated.predictions)
        if not compute_result:
            return {}
        loss = self._total / self._rows
        self._total, self._rows = 0.0, 0
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def draw_loss(
    history: list[dict[str, float]], path: Path, bigram_loss: float | None = None
) -> None:
    """Draw the losses in `history`, a `TrainerState.log_history`, to the PNG file `path`.

    Args:
        bigram_loss: that of a bigram model of the same tokens, for comparison.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    for key, name, line in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            label = f"{name}, {points[-1][1]:.3f} at step {points[-1][0]:.0f}"
            axes.plot(*zip(*points, strict=True), line, label=label)
    if bigram_loss is not None:
        label = f"best bigram model, {bigram_loss:.3f}"
        axes.axhline(bigram_loss, color="gray", linestyle="--", label=label)
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    with new_file(path) as unfinished:
        figure.savefig(unfinished, format="png")


class KeepFolder(TrainerCallback):
    """Keeps `loss.png` up to date, and of the checkpoints the last `count` and the best."""

    def __init__(self, count: int | None) -> None:
        self.count = count

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        if state.is_world_process_zero:
            draw_loss(state.log_history, Path(args.output_dir, CURVE))

    on_train_end = on_evaluate

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        # The Trainer orders checkpoints by their times, and warns when those are close.
        if args.should_save:
            rotate_checkpoints(args.output_dir, self.count, state.best_model_checkpoint)


class SampleText(TrainerCallback):
    """Lets the model continue `prompt` every `steps` steps, and after the last; see `train`.

    `generation` is for `generate`, such as `temperature`.

    It has random numbers of its own, the same each time, so training goes as without it. Where the
    weights are split over processes, all of them write, and the first reports.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str,
        steps: int,
        report: Callable[[int, str], None] | None,
        **generation: Any,
    ) -> None:
        self.tokenizer, self.prompt, self.steps = tokenizer, prompt, steps
        self.generation = {"do_sample": True, "top_k": 50, **generation}
        self.report = report or (
            lambda step, text: logger.info(f"Sample after {step} steps: {text}")
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        if state.global_step % self.steps and state.global_step < state.max_steps:
            return
        # The first FSDP gathers the parts in its outermost wrapper, which cannot generate.
        if isinstance(model, FullyShardedDataParallel):
            return
        is_split = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        if state.is_world_process_zero or is_split:
            text = self._write(model, args)
            if state.is_world_process_zero:
                self.report(state.global_step, text)

    def _write(self, model: Any, args: TrainingArguments) -> str:
        """The prompt and what `model` makes of it."""
        end, was_training = self.tokenizer.eos_token, model.training
        options = {**self.generation, "use_cache": True}
        options["pad_token_id"] = self.tokenizer.eos_token_id
        devices = [] if args.device.type == "cpu" else [args.device]
        model.eval()
        with torch.random.fork_rng(devices, device_type=args.device.type):
            torch.manual_seed(args.seed)
            written = write(model, self.tokenizer, self.prompt or end, 64, **options)
        model.train(was_training)
        return self.prompt + written


class StopOnSignal(TrainerCallback):
    """Ends training with a checkpoint on Ctrl-C (SIGINT) or SIGTERM, and can `announce` it.

    As a context manager, it catches the signals. The step or evaluation that is running is finished
    first; a second Ctrl-C ends everything at once. Of several processes, all stop at the same step.
    Outside the main thread, the only one that gets signals, it does nothing.
    """

    def __init__(self, announce: bool) -> None:
        self.announce, self._process = announce, os.getpid()
        self.caught = self.stopped = False
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._earlier[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._earlier:
            signal.signal(*self._earlier.popitem())

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a data loader's process, forked with this handler; torch handles SIGTERM there
        # Only Ctrl-C counts twice: torchrun passes it on, and then sends SIGTERM as well.
        if self.caught and number == signal.SIGINT:
            self.__exit__()
            signal.raise_signal(number)
            return
        if self.announce and not self.caught:
            logger.warning("Stopping after this step, with a checkpoint; Ctrl-C again ends at once")
        self.caught = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1:
            caught = torch.tensor(int(self.caught), device=args.device)
            dist.all_reduce(caught, op=dist.ReduceOp.MAX)
            self.caught = bool(caught)
        if self.caught and not control.should_training_stop:
            self.stopped = control.should_save = control.should_training_stop = True

    on_evaluate = on_step_end

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Stopped in the middle of an epoch, what is due at its end is not yet due.
        if self.stopped and state.epoch % 1:
            control.should_evaluate = control.should_save = False
