"""Answers of a model to prompts: as text while it comes, or a JSON object each."""

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import typer
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..checkpoints.sources import told_as_error
from ..writing import Conversation, Written, encode, write_after

_PROMPT = "> "
# Of the characters that steer a terminal, all but the end of a line and the tabulator.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Writer:
    """Writes after prompts, and shows what it writes.

    Args:
        name: the model as the user has given it.
        seed: of the first text after a prompt; the others have the next ones.
        sampling: arguments of `write_after`.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    seed: int
    samples: int
    as_json: bool
    sampling: dict[str, Any]

    def answer(self, prompt: str) -> None:
        """Show texts that begin with `prompt`."""
        ids = encode(self.tokenizer, prompt)
        for number in range(self.samples):
            if self.samples > 1 and not self.as_json:
                Console().rule(f"{number + 1} of {self.samples}", style="none")
            self.write(ids, prompt, prompt, (self.seed + number) % 2**32, [])

    def write(
        self, ids: list[int], prompt: str, beginning: str, seed: int, pieces: list[str]
    ) -> None:
        """Show one text after the tokens `ids` of `prompt`, and put its pieces into `pieces`."""

        def show(piece: str) -> None:
            pieces.append(piece)
            if not self.as_json:
                _show(piece)

        if not self.as_json:
            _show(beginning)
        set_seed(seed)
        try:
            with told_as_error(self.name):  # what its configurations say of writing
                written = write_after(
                    self.model,
                    self.tokenizer,
                    ids,
                    on_text=show,
                    with_logprobs=self.as_json,
                    **self.sampling,
                )
        finally:
            if not self.as_json:
                _show("\n")
        if self.as_json:
            _show_object(prompt, seed, written)
        if written.cut:
            window = self.model.config.max_position_embeddings
            _notice(f"{written.cut:,} tokens from the front did not fit the window of {window:,}")


def answer_terminal(writer: Writer) -> None:
    """Answer what is typed, until Ctrl-D; Ctrl-C stops a text."""
    room = writer.model.config.max_position_embeddings
    room -= min(writer.sampling["max_new_tokens"], room // 2)
    has_template = writer.tokenizer.chat_template is not None
    talk = Conversation(writer.tokenizer, room) if has_template else None
    what = "A conversation" if talk else "A prompt a line"
    _notice(f"{what}; Ctrl-C stops a text, Ctrl-D ends")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what comes after is an error again
    for number, line in enumerate(_typed()):
        once = replace(writer, seed=(writer.seed + number * writer.samples) % 2**32)
        with _stopped_by_ctrl_c():
            if talk is None:
                once.answer(line)
            else:
                _talk(once, talk, line)


def _talk(writer: Writer, talk: Conversation, line: str) -> None:
    """Answer `line` in a conversation; a text that is stopped is an answer too."""
    with told_as_error(writer.name):  # the template may not take it
        ids, left_out = talk.ask(line)
    if left_out:
        _notice(f"the first {left_out} messages no longer fit the window and were left out")
    pieces: list[str] = []
    try:
        writer.write(ids, line, "", writer.seed, pieces)
    finally:
        talk.answer("".join(pieces))


def lines() -> Iterator[str]:
    """The lines of standard input that are not empty, as they come."""
    found = False
    with _readable():
        for line in sys.stdin:
            if text := line.rstrip("\r\n"):
                found = True
                yield text
    if not found:
        raise ValueError("standard input holds no prompt; give one in a line, or as an argument")


def everything() -> str:
    """All of standard input."""
    with _readable():
        return sys.stdin.read()


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(
            f"standard input is not {error.encoding} text ({error.reason}); convert it first"
        ) from None


def _typed() -> Iterator[str]:
    """Lines that are typed, with history; Ctrl-C begins a line anew, and Ctrl-D ends."""
    with suppress(ImportError):
        import readline  # noqa: F401  # `input` edits lines by it; Windows has its own way
    is_shown = sys.stdout.isatty()  # otherwise standard output is for results alone
    while True:
        try:
            if not is_shown:
                typer.echo(_PROMPT, nl=False, err=True)
            line = input(_PROMPT if is_shown else "")
        except KeyboardInterrupt:
            typer.echo(err=True)
            continue
        except EOFError:
            typer.echo(err=True)
            return
        if line.strip():
            yield line


@contextmanager
def _stopped_by_ctrl_c() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _notice("stopped")


def _show_object(prompt: str, seed: int, written: Written) -> None:
    content = dict(
        prompt=prompt, seed=seed, text=written.text, ids=written.ids, logprobs=written.logprobs
    )
    _show(json.dumps(content) + "\n", as_it_is=True)


def _show(text: str, as_it_is: bool = False) -> None:
    """Write to standard output at once; what would steer a terminal is written as escapes."""
    if sys.stdout.isatty() and not as_it_is:
        text = _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads any more; what is buffered must not be tried again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _notice(text: str) -> None:
    typer.echo(f"note: {text}", err=True)
