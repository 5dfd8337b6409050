"""How training goes, in a terminal: a bar with the loss so far, and lines for what is worth one."""

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_LEVELS = "▁▂▃▄▅▆▇█"
_WIDTH = 16


def sparkline(values: list[float], width: int = _WIDTH) -> str:
    """`values` as a row of at most `width` bars, the lowest value the lowest bar."""
    if not values:
        return ""
    count = min(width, len(values))
    # The last value of each of equal parts.
    shown = [values[len(values) * (place + 1) // count - 1] for place in range(count)]
    low, high = min(shown), max(shown)
    scale = (len(_LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(_LEVELS[round((value - low) * scale)] for value in shown)


class TerminalProgress(TrainerCallback):
    """Shows progress on a console: a live line in a terminal, a line now and then elsewhere.

    Args:
        console: where to show it.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._losses: list[float] = []
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]} {task.fields[curve]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=None, loss="", curve="")

    def say(self, line: str) -> None:
        """Print `line` above the live one."""
        self._progress.console.print(line, markup=False, highlight=False)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        if state.is_world_process_zero:
            self._progress.update(self._task, total=state.max_steps, completed=state.global_step)
            self._progress.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        step = f"step {state.global_step:>{len(str(state.max_steps))}} of {state.max_steps}"
        if "loss" in logs:
            self._losses.append(logs["loss"])
            self._progress.update(
                self._task, loss=f"{logs['loss']:.3f}", curve=sparkline(self._losses)
            )
            if not self.console.is_terminal:
                self.say(f"{step}: loss {logs['loss']:.3f}")
        if "eval_loss" in logs:
            self.say(
                f"{step}: validation loss {logs['eval_loss']:.3f} nats per token, "
                f"perplexity {logs['eval_perplexity']:.1f}"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._progress.stop()
