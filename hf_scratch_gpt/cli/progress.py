"""How training goes, in a terminal: a bar with the loss so far, and a line for each validation."""

from typing import Any

from rich.console import Console
from rich.progress import Progress
from transformers import TrainerCallback, TrainerState


class TerminalProgress(TrainerCallback):
    """Shows progress on `console`: a live line in a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("training", total=None)

    def on_train_begin(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        if state.is_world_process_zero:
            self._progress.update(self._task, total=state.max_steps)
            self._progress.start()

    def on_step_end(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        if not state.is_world_process_zero:
            return
        logs = state.log_history[-1]
        step = f"step {state.global_step:>{len(str(state.max_steps))}} of {state.max_steps}"
        if "loss" in logs:
            loss = f"loss {logs['loss']:.3f}"
            self._progress.update(self._task, description=loss)
            if not self.console.is_terminal:
                self.console.print(f"{step}: {loss}")
        if "eval_loss" in logs:
            self.console.print(
                f"{step}: validation loss {logs['eval_loss']:.3f} nats per token, "
                f"perplexity {logs['eval_perplexity']:.1f}"
            )

    def on_train_end(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        self._progress.stop()
