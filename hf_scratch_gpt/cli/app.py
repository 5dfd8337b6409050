"""The command line, `hf-scratch-gpt`: size a GPT, write with it, train it, see it all in a demo."""

import json
import os
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..messages import TOLD, one_line
from .conversion import PASS_ON, convert, export, verify
from .evaluate import evaluate
from .inspect_model import inspect
from .serve import serve

if TYPE_CHECKING:
    from ..training.run import TrainingResult

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes would not leave the help of `train` on one screen
)

app.command("eval")(evaluate)
app.command()(inspect)
for command in (convert, export, verify):
    app.command(context_settings=PASS_ON)(command)


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


@app.command()
def info(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME",
            help="Preset (gpt2, 355M, gpt3-xl, ...), folder of a model, or owner/name on the Hub.",
        ),
    ],
    tokens: Annotated[float | None, typer.Option(help="Tokens to train on, such as 300e9.")] = None,
    flops: Annotated[
        float | None, typer.Option(help="FLOP/s that the device sustains, such as 28e12.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Texts in a step of training.")] = 1,
    length: Annotated[int | None, typer.Option(help="Tokens of a text, if not all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain numbers as JSON.")] = False,
) -> None:
    """Show sizes and costs of models.

    Parameters, storage, cache, FLOPs, and memory and time to train. Several names stand side by
    side. Only configurations are read.
    """
    from .size_table import find_config, show, summarize

    if (tokens is None) != (flops is None):
        raise ValueError("--tokens and --flops give a time together; give both or neither")
    sizes = (batch_size, length, tokens, flops)
    summaries = {name: summarize(find_config(name), *sizes) for name in names}
    console = Console(highlight=False, markup=False)
    if as_json:
        console.out(json.dumps([{"name": name, **parts} for name, parts in summaries.items()]))
    else:
        show(console, summaries)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model of ours or a GPT-2.")],
    prompt: Annotated[
        str | None, typer.Argument(help="What to continue; standard input if not given.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among so many; 0 for all.")] = 40,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Choose among so probable.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed writes the same texts.")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="How many texts to write.")] = 1,
    fast: Annotated[bool, typer.Option("--fast", help="Compile first, to write faster.")] = False,
    weights: Annotated[str | None, typer.Option(help="Fast, in int8, int4 or fp8.")] = None,
) -> None:
    """Continue a prompt; the text is shown as it comes.

    Where its window is full, the model goes on from the last half of it.
    """
    from transformers import set_seed

    from ..checkpoints.sources import told_as_error
    from ..writing import write
    from .models import load

    sampling: dict[str, float | None] = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    if temperature == 0:
        sampling = dict.fromkeys(sampling)
    sampling["do_sample"] = temperature > 0
    text = sys.stdin.read() if prompt is None or prompt == "-" else prompt
    network, tokenizer = load(model, fast, weights)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    show = partial(console.out, end="", highlight=False)
    for number in range(samples):
        if samples > 1:
            console.rule(f"{number + 1} of {samples}")
        set_seed(seed + number)
        show(text)
        with told_as_error(model):  # what its configurations say of writing
            write(network, tokenizer, text, max_new_tokens, show, **sampling)
        console.out("")


@app.command(context_settings={"ignore_unknown_options": True})
def train(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Text, .jsonl or .parquet files, folders, or a Hub data set; after them any flag "
            "of transformers' TrainingArguments, such as --learning-rate 1e-3.",
        ),
    ],
    output_dir: Annotated[Path, typer.Option(help="Folder of the run; resumes one begun.")],
    model: Annotated[str, typer.Option(help="Preset, or folder or Hub id.")] = "gpt2",
    tokenizer: Annotated[str | None, typer.Option(help="Its folder or Hub id.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens of an example.")] = None,
    validation: Annotated[str, typer.Option(help="Part to validate on, or other texts.")] = "0.05",
    validation_tokens: Annotated[int, typer.Option(help="Tokens of that at most.")] = 1_000_000,
    text_field: Annotated[str, typer.Option(help="Field with the text.")] = "text",
    sample_prompt: Annotated[str | None, typer.Option(help="Text to continue at times.")] = None,
    sample_steps: Annotated[float, typer.Option(help="How often; below 1, part of all.")] = 0.1,
) -> None:
    """Train a GPT on texts; Ctrl-C stops it with a checkpoint.

    The same command goes on from there. Runs under torchrun too.
    """
    import torch.distributed

    from ..checkpoints.saved import check_model
    from ..training import run, setup
    from .progress import TerminalProgress

    check_model(model)
    place = next((i for i, source in enumerate(sources) if source.startswith("-")), len(sources))
    console = Console(highlight=False, markup=False)
    try:
        result = run.train(
            sources[:place],
            output_dir,
            model=model,
            tokenizer=tokenizer,
            block_size=block_size,
            validation=_number_or_text(validation),
            validation_tokens=validation_tokens,
            text_field=text_field,
            sample_prompt=sample_prompt,
            sample_steps=sample_steps,
            on_sample=lambda step, text: console.print(f"step {step} writes: {text}"),
            on_notice=partial(console.print, soft_wrap=True),
            progress=TerminalProgress(console),
            **setup.parse_flags(sources[place:]),
        )
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if os.environ.get("RANK", "0") == "0":
        console.print(_end_of(result))


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _end_of(result: "TrainingResult") -> str:
    """What to say when a training has ended."""
    if result.interrupted:
        return f"stopped after {result.steps} steps; the same command goes on from there"
    loss = result.last("eval_loss") or result.last("train_loss")
    already = ", as it was before" if result.went_on_from == result.steps else ""
    return (
        f"{result.steps} steps, loss {loss:.3f} nats per token{already}; the model, loss.png and "
        f"checkpoints are in {result.folder}"
    )


@app.command()
def clear_cache(
    folder: Annotated[Path | None, typer.Argument(help="Where they are, if elsewhere.")] = None,
) -> None:
    """Remove the token ids that `train` has kept.

    They serve trainings on the same texts.
    """
    from ..training import corpus

    removed = corpus.clear_cache(folder)
    typer.echo(f"removed {removed / 1e6:,.1f} MB from {folder or corpus.CACHE}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/demo"),
) -> None:
    """Train a small GPT in two minutes, and let it write.

    It learns from Python's own manual, without a network. The model is saved, and loaded again to
    write.
    """
    from .demo import run_demo

    run_demo(out, Console(highlight=False, markup=False))


app.command()(serve)


def main() -> None:
    """Run the command line; an error of the user is one line and exit code 2."""
    try:
        app()
    except TOLD as error:
        line = f"error: {one_line(error)}"
        Console(stderr=True, markup=False, highlight=False).print(line, soft_wrap=True)
        raise SystemExit(2) from None
