"""The command line, `hf-scratch-gpt`: a command a file, none of which imports torch by itself."""

import os
import sys
from importlib import metadata
from typing import Annotated

import typer
from rich.console import Console

from ..messages import TOLD, one_line
from .conversion import convert, export, verify
from .demo import demo
from .evaluate import evaluate
from .generate import generate
from .info import info
from .inspect_model import inspect
from .serve import serve
from .train import clear_cache, train

FAILED, MISUSED, INTERRUPTED = 1, 2, 130  # exit codes, as shells and click have them

# What the user gave is wrong; of other errors, what was asked could not be done.
_MISUSES = (ValueError, FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError)

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(demo)
app.command()(info)
app.command()(generate)
app.command()(inspect)
app.command("eval")(evaluate)
app.command()(serve)
# After the texts it takes any flag of `TrainingArguments`.
app.command(context_settings={"ignore_unknown_options": True})(train)
app.command()(clear_cache)
app.command()(convert)
app.command()(export)
app.command()(verify)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(metadata.version("hf_scratch_gpt"))
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Show the version, and exit."
        ),
    ] = False,
) -> None:
    """A GPT written from scratch that works with Hugging Face transformers as its own models do."""
    if not sys.stderr.isatty():  # transformers would write its bars into a log
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, with the `arguments` of this process if none are given.

    It exits with 0, 1 (it could not be done), 2 (something given is wrong) or 130 (Ctrl-C). Errors
    of the first two kinds are one line.
    """
    try:
        app(arguments, prog_name=arguments and "hf-scratch-gpt")
    except TOLD as error:
        line = f"error: {one_line(error)}"
        Console(stderr=True, markup=False, highlight=False).print(line, soft_wrap=True)
        raise SystemExit(MISUSED if isinstance(error, _MISUSES) else FAILED) from None
