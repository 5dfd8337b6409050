"""`hf-scratch-gpt convert`, `export` and `verify`: GPT-2s of other formats, in and out."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer
from rich.console import Console

from ..messages import printable

if TYPE_CHECKING:
    from ..checkpoints.sources import GPT2Source

Format = Literal["openai", "hf", "nanogpt", "textbook", "state_dict", "llmc"]
Activation = Literal["tanh", "exact", "gelu_new", "gelu"]

# What says which model to read, and how.
Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Folder, file or Hub id of a GPT-2; 124M, 355M, 774M or 1558M for OpenAI's own.",
    ),
]
Kind = Annotated[
    Format | None,
    typer.Option(
        "--format", metavar="NAME", help=f"{', '.join(get_args(Format))}; found out if not given."
    ),
]
Vocabulary = Annotated[
    str | None, typer.Option("--tokenizer", help="Folder with the vocabulary, if it has none.")
]
Heads = Annotated[int | None, typer.Option("--num-heads", help="Heads, of weights alone.")]
Preset = Annotated[
    str | None, typer.Option(help="Size of weights alone, by its name, such as gpt2-medium.")
]
Gelu = Annotated[
    Activation | None,
    typer.Option(
        "--activation",
        metavar="NAME",
        help=f"GELU's form, of nanoGPT or weights alone: {' or '.join(get_args(Activation)[:2])}.",
    ),
]
Out = Annotated[str, typer.Argument(metavar="OUT", help="Folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")]


def convert(
    source: Source,
    out: Out,
    overwrite: Overwrite = False,
    kind: Kind = None,
    tokenizer: Vocabulary = None,
    num_heads: Heads = None,
    preset: Preset = None,
    activation: Gelu = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(metavar="TYPE", help="float32, bfloat16 or float16; the source's by itself."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "50GB",
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not compare logits.")] = False,
) -> None:
    """Convert a GPT-2 of any format to a saved model.

    OpenAI's own are fetched from the Hub, and checked by their digest.
    The logits of the result are compared with the source's.
    """
    import torch

    from ..checkpoints.convert import convert as make
    from ..files import destination

    read_from = [place for place in (source, tokenizer) if place]
    folder = destination(out, overwrite, read_from)
    as_type = getattr(torch, dtype) if dtype else None
    with _stoppable():
        opened = _open(source, kind, tokenizer, num_heads, preset, activation)
        report = make(opened, folder, as_type, max_shard_size, not no_verify, overwrite)
    _show(report)


def export(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder of a model of ours.")],
    out: Out,
    overwrite: Overwrite = False,
) -> None:
    """Save a model as GPT-2, for programs without this package.

    The logits of the result are compared with the source's.
    """
    from ..checkpoints.convert import export as make
    from ..files import destination

    folder = destination(out, overwrite, [source])
    with _stoppable():
        report = make(Path(source), folder, overwrite)
    _show(report)


def verify(
    source: Source,
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="Folder of the model that was made of it.")
    ],
    kind: Kind = None,
    tokenizer: Vocabulary = None,
    num_heads: Heads = None,
    preset: Preset = None,
    activation: Gelu = None,
) -> None:
    """Compare a saved model with the GPT-2 it was made of.

    Both compute logits, the GPT-2 by transformers' code.
    Exit code 1 says that they differ.
    """
    from ..checkpoints.assemble import plan
    from ..checkpoints.verify import verify as compare

    with _stoppable():
        opened = _open(source, kind, tokenizer, num_heads, preset, activation)
        plan(opened)  # tells what is missing or misshapen
        with Console(stderr=True).status("Comparing"):
            report = [compare(opened, Path(out))]
    _show(report)


def _open(
    source: str,
    kind: str | None,
    tokenizer: str | None,
    num_heads: int | None,
    preset: str | None,
    activation: str | None,
) -> "GPT2Source":
    from ..checkpoints.readers import open_source

    sizes = dict(num_heads=num_heads, preset=preset, activation=activation)
    return open_source(source, kind, tokenizer, **sizes)


def _show(report: list[str]) -> None:
    typer.echo("\n".join(map(printable, report)))


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does, so that what is unfinished is removed; say so then."""
    in_main_thread = threading.current_thread() is threading.main_thread()  # others get no signals
    before = in_main_thread and signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("stopped; nothing was changed", err=True)
        raise typer.Exit(130) from None
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)
