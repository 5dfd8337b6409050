"""`hf-scratch-gpt demo`: OpenAI's format in a second, a GPT from nothing in two minutes."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def demo(
    out: Annotated[
        str, typer.Option(metavar="<path>", help="Folder for the results.")
    ] = "out/demo",
) -> None:
    """Train a small GPT in two minutes, and let it write.

    It learns from Python's own manual and docstrings, without a network. Started again, it goes on
    from where it was stopped.
    """
    console = Console(highlight=False, markup=False)
    with console.status("Loading PyTorch and transformers"):
        from ..files import without_progress_bars
        from .demo_run import run_demo

    with without_progress_bars():  # all of it is seconds, but the training, which has its own
        if not run_demo(Path(out), console):
            raise typer.Exit(130)  # as of Ctrl-C elsewhere
