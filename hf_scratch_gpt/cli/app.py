"""The command line, `hf-scratch-gpt`: a command a file, none of which imports torch by itself."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

from ..messages import is_told, one_line
from .conversion import convert, export, verify
from .demo import demo
from .evaluate import evaluate
from .generate import generate
from .info import info
from .inspect_model import inspect
from .new import new
from .options import in_words_of_the_user
from .serve import serve
from .tools import PASS_ON, with_tool
from .train import clear_cache, train

FAILED, MISUSED, INTERRUPTED = 1, 2, 130  # exit codes, as shells and click have them

# What the user gave is wrong; of other errors, what was asked could not be done.
_MISUSES = (ValueError, FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError)

# By name; what stands behind TOOL is the tool's, and behind SOURCE any flag of TrainingArguments.
_COMMANDS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "demo": (demo, {}),
    "info": (info, {}),
    "generate": (generate, {}),
    "inspect": (inspect, {}),
    "eval": (evaluate, {}),
    "serve": (serve, {}),
    "with": (with_tool, PASS_ON),
    "train": (train, {"ignore_unknown_options": True}),
    "clear-cache": (clear_cache, {}),
    "convert": (convert, {}),
    "export": (export, {}),
    "verify": (verify, {}),
    "new": (new, {}),
}


def _description(command: Callable[..., None]) -> str:
    """The docstring of `command`, a paragraph a line: lines are broken for the terminal."""
    paragraphs = (command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
for name, (command, settings) in _COMMANDS.items():
    add = app.command(name, help=_description(command), context_settings=settings)
    add(in_words_of_the_user(command))


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


@contextmanager
def _told_in_a_line() -> Iterator[None]:
    """Turn errors into a line and an exit code."""
    try:
        yield
    except Exception as error:
        if not is_told(error):
            raise
        line = f"error: {one_line(error)}"
        Console(stderr=True, markup=False, highlight=False).print(line, soft_wrap=True)
        raise SystemExit(MISUSED if isinstance(error, _MISUSES) else FAILED) from None


@contextmanager
def _interruptible() -> Iterator[None]:
    """After Ctrl-C, whatever it leads to ends with its exit code.

    It comes out of an import that it interrupts as an error of another kind.
    """
    caught: list[int] = []

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # a program around this has its own way
        yield
        return
    signal.signal(signal.SIGINT, catch)
    try:
        yield
    except Exception:
        if caught:
            raise SystemExit(INTERRUPTED) from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, with the `arguments` of this process if none are given.

    It exits with 0, 1 (it could not be done), 2 (something given is wrong) or 130 (Ctrl-C). Errors
    of the first two kinds are one line.
    """
    with _told_in_a_line(), _interruptible():
        app(arguments, prog_name="hf-scratch-gpt")
