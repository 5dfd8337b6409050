"""How training goes, in a terminal: a bar with the loss so far, and a line for each validation."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TerminalProgress(TrainerCallback):
    """Shows progress on `console`: a live line in a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=None, loss="")

    def say(self, line: str) -> None:
        """Print `line` above the live one."""
        self.console.print(line, markup=False, highlight=False)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._progress.update(self._task, total=state.max_steps)
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
            loss = f"loss {logs['loss']:.3f}"
            self._progress.update(self._task, loss=loss)
            if not self.console.is_terminal:
                self.say(f"{step}: {loss}")
        if "eval_loss" in logs:
            self.say(
                f"{step}: validation loss {logs['eval_loss']:.3f} nats per token, "
                f"perplexity {logs['eval_perplexity']:.1f}"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._progress.stop()
