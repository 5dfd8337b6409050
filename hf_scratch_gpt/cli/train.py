"""`hf-scratch-gpt train`, and `clear-cache` of what it keeps."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from ..training.run import TrainingResult


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
    console = Console(stderr=True, highlight=False, markup=False)
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
        typer.echo(_end_of(result), err=result.interrupted)
    if result.interrupted:
        raise typer.Exit(130)  # as of Ctrl-C elsewhere


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


def clear_cache(
    folder: Annotated[Path | None, typer.Argument(help="Where they are, if elsewhere.")] = None,
) -> None:
    """Remove the token ids that `train` has kept.

    They serve trainings on the same texts.
    """
    from ..training import corpus

    removed = corpus.clear_cache(folder)
    typer.echo(f"removed {removed / 1e6:,.1f} MB from {folder or corpus.CACHE}")
