"""What goes on beside the steps of training: evaluation, the curve, samples, a clean stop."""

import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
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
from .run_folder import CURVE

logger = logging.get_logger(__name__)


def losses_of_rows(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean loss of each row, (B,), in nats per token, from (B, T, V) and (B, T)."""
    scores, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    losses = F.cross_entropy(scores.float(), targets, reduction="none")
    return losses.view(len(labels), -1).mean(dim=1)


def loss_and_perplexity(evaluated: EvalPrediction) -> dict[str, float]:
    """The mean of all rows' losses and its exponential.

    A mean over rows is the same for any batch size and any number of processes. The Trainer's own,
    which this replaces, counts the rows twice that fill up the last batch.
    """
    loss = float(np.mean(evaluated.predictions, dtype=np.float64))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def draw_loss(history: list[dict[str, float]], path: str | os.PathLike[str]) -> None:
    """Draw training and validation loss over the steps.

    Args:
        history: what was logged, as in `TrainerState.log_history`.
        path: the PNG file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    for key, name, color, marker in (
        ("loss", "training", "tab:blue", ""),
        ("eval_loss", "validation", "tab:orange", "o"),
    ):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            label = f"{name}, {points[-1][1]:.3f} at step {points[-1][0]:.0f}"
            axes.plot(
                *zip(*points, strict=True), color=color, marker=marker, markersize=4, label=label
            )
            axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    with new_file(Path(path)) as unfinished:
        figure.savefig(unfinished, format="png")


class LossCurve(TrainerCallback):
    """Keeps `loss.png` in the output folder up to date."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            draw_loss(state.log_history, Path(args.output_dir, CURVE))

    on_train_end = on_evaluate


class KeepCheckpoints(TrainerCallback):
    """Keeps the last `count` checkpoints and the best, and deletes the others.

    The Trainer orders them by their folders' times, and warns when those of a short run are close.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.should_save:
            rotate_checkpoints(args.output_dir, self.count, state.best_model_checkpoint)


class SampleText(TrainerCallback):
    """Lets the model continue a prompt every so many steps, and after the last.

    It has random numbers of its own, the same each time, so training goes as without it. Where the
    weights are split over processes, all of them write, and the first reports.

    Args:
        tokenizer: of the model.
        prompt: the text to continue; may be empty.
        steps: after how many steps of training to write.
        report: is called with the step and the text, prompt included; if not given, it is logged.
        length: how many tokens to write.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str,
        steps: int,
        report: Callable[[int, str], None] | None,
        length: int = 64,
    ) -> None:
        self.tokenizer, self.prompt = tokenizer, prompt
        self.steps, self.report, self.length = steps, report, length

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step % self.steps and state.global_step < state.max_steps:
            return
        # The first FSDP gathers the parts in its outermost wrapper, which cannot generate.
        if isinstance(model, FullyShardedDataParallel):
            return
        is_split = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        if state.is_world_process_zero or is_split:
            text = self.write(model, args.device, args.seed)
            if state.is_world_process_zero:
                if self.report is not None:
                    self.report(state.global_step, text)
                else:
                    logger.info(f"Sample after {state.global_step} steps: {text}")

    def write(self, model: Any, device: torch.device, seed: int) -> str:
        """The prompt and what `model` makes of it."""
        ids = self.tokenizer(self.prompt, add_special_tokens=False)["input_ids"]
        limit = model.config.max_position_embeddings
        # A prompt that would leave little room loses its first tokens.
        ids = (ids or [self.tokenizer.eos_token_id])[-max(1, limit // 2) :]
        inputs = torch.tensor([ids], device=device)
        was_training = model.training
        model.eval()
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices, device_type=device.type), torch.no_grad():
            torch.manual_seed(seed)
            written = model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=min(self.length, limit - len(ids)),
                do_sample=True,
                top_k=50,
                use_cache=True,
                pad_token_id=self.tokenizer.eos_token_id,
            )
        model.train(was_training)
        return self.tokenizer.decode(written[0], skip_special_tokens=True)


class StopOnSignal(TrainerCallback):
    """Ends training with a checkpoint on Ctrl-C (SIGINT) or SIGTERM.

    As a context manager, it catches the signals. The step or evaluation that is running is finished
    first; a second Ctrl-C ends everything at once. Of several processes, all stop at the same step.
    Outside the main thread, the only one that gets signals, it does nothing.

    Args:
        announce: log that the signal has come.
    """

    def __init__(self, announce: bool = True) -> None:
        self.announce = announce
        self.caught = self.stopped = False
        self._earlier: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

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
            # A data loader's process, forked with these handlers; the loader ends it by SIGTERM.
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
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
        if not control.should_training_stop and self._any_caught(args):
            self.stopped = control.should_save = control.should_training_stop = True

    on_evaluate = on_step_end

    def _any_caught(self, args: TrainingArguments) -> bool:
        if args.world_size == 1:
            return self.caught
        caught = torch.tensor(int(self.caught), device=args.device)
        dist.all_reduce(caught, op=dist.ReduceOp.MAX)
        return bool(caught)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Stopped in the middle of an epoch, what is due at its end is not yet due.
        if self.stopped and state.epoch % 1:
            control.should_evaluate = control.should_save = False
