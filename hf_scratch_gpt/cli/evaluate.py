"""`hf-scratch-gpt eval`: how well a model predicts texts."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress

    from ..evaluation import Evaluation


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a causal language model.")
    ],
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT", help="Text, .jsonl or .parquet files, folders, or a Hub data set."
        ),
    ],
    window: Annotated[
        int | None,
        typer.Option(
            help="Tokens seen at once; the model's positions, at most 4096, if not given."
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens by which the window moves; half the window if not given."),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field with the text.")] = "text",
    as_json: Annotated[bool, typer.Option("--json", help="Print plain numbers as JSON.")] = False,
) -> None:
    """Measure a model's perplexity on texts.

    A window slides over each text; bits per byte and the time are measured as well.
    """
    from ..evaluation import evaluate as measure
    from ..training.texts import find, read, size_of
    from .models import load

    sources = find(texts)
    network, tokenizer = load(model)
    pieces = (piece for source in sources for piece in read(source, text_field))
    with _progress() as progress:
        task = progress.add_task("evaluating", total=sum(map(size_of, sources)))
        result = measure(
            network, tokenizer, pieces, window, stride, lambda size: progress.advance(task, size)
        )
    console = Console(highlight=False, markup=False)
    if as_json:
        numbers = dict(perplexity=result.perplexity, bits_per_byte=result.bits_per_byte)
        console.out(json.dumps({"model": model, **numbers, **asdict(result)}))
    else:
        _show(console, result)


def _progress() -> "Progress":
    """A bar on standard error, in a terminal only."""
    from rich import progress

    console = Console(stderr=True)
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _show(console: Console, result: "Evaluation") -> None:
    speed = result.tokens / result.seconds
    for name, value in {
        "perplexity": f"{result.perplexity:,.4f}",
        "nats per token": f"{result.nats_per_token:.4f}",
        "bits per byte": f"{result.bits_per_byte:.4f}",
        "texts": f"{result.texts:,} of {result.bytes:,} bytes",
        "tokens": f"{result.tokens:,}, of which {result.scored_tokens:,} scored",
        "window": f"{result.window:,} tokens, moved by {result.stride:,}",
        "time": f"{result.seconds:,.1f} s, {speed:,.0f} tokens/s",
    }.items():
        console.out(f"{name:<16}{value}")
