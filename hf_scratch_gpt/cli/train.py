"""`hf-scratch-gpt train`, and `clear-cache` of what it keeps."""

import inspect
import os
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..messages import printable
from . import options

if TYPE_CHECKING:
    from ..training.run import TrainingResult

# Options whose names in Python are others.
_SIZES = {option: options.FIELDS[option] for option in ("n_layer", "n_head", "n_embd")}
_FLAGS = {
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "lr": "learning_rate",
}


def train(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT",
            help="Text, .jsonl or .parquet files, folders, or a Hub data set; beside them any flag "
            "of transformers' TrainingArguments, such as --weight-decay 0.01.",
        ),
    ],
    output_dir: Annotated[
        str, typer.Option(metavar="<path>", help="Folder of the run; resumes one begun.")
    ],
    init_from: Annotated[
        str | None,
        typer.Option(help="Start from pretrained weights: a folder, a Hub id, or gpt2."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Fresh weights of a published size: gpt2, gpt3-small, ...")
    ] = None,
    model: Annotated[str | None, typer.Option(hidden=True)] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id; or made of the texts: char, bpe, or bpe:4096. If not given, "
            "that of the weights; else GPT-2's if it is on this machine, else bpe.",
        ),
    ] = None,
    n_layer: Annotated[int | None, typer.Option(help="Blocks of fresh weights.")] = None,
    n_head: Annotated[int | None, typer.Option(help="Attention heads in each.")] = None,
    n_embd: Annotated[int | None, typer.Option(help="Width of a token's vector.")] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Tokens of an example, and positions of fresh weights.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Times through the texts.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a step, per device.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="Train a LoRA adapter of the pretrained weights.")
    ] = False,
    lora_r: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 8,
    lora_merge: Annotated[
        bool, typer.Option("--lora-merge", help="Add it to the weights at the end.")
    ] = False,
    validation: Annotated[str, typer.Option(help="Part to validate on, or other texts.")] = "0.05",
    validation_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of that at most; a million, in a short training fewer."),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field with the text.")] = "text",
    sample_prompt: Annotated[str | None, typer.Option(help="Text to continue at times.")] = None,
    sample_steps: Annotated[float, typer.Option(help="How often; below 1, part of all.")] = 0.1,
) -> None:
    """Train a GPT on texts; Ctrl-C stops it with a checkpoint.

    The same command goes on from there; with more --epochs or --max-steps it lengthens a finished
    run. Without a model's name it trains a small one, of 4 blocks. Runs under torchrun too.
    """
    import torch.distributed

    from ..checkpoints.saved import check_model
    from ..training import run, setup
    from .progress import TerminalProgress

    told = Console(highlight=False, markup=False, stderr=True)
    sizes = {_SIZES["n_layer"]: n_layer, _SIZES["n_head"]: n_head, _SIZES["n_embd"]: n_embd}
    shortcuts = {"epochs": epochs, "batch_size": batch_size, "lr": lr}
    try:
        start, overrides = _start(init_from, preset, model, _given(sizes), block_size)
        if setup.is_saved(start):
            check_model(str(start))
        texts, flags = setup.part_words(sources)
        result = run.train(
            texts,
            output_dir,
            model=start,
            overrides=overrides,
            tokenizer=tokenizer,
            block_size=block_size,
            validation=_number_or_text(validation),
            validation_tokens=validation_tokens,
            text_field=text_field,
            sample_prompt=sample_prompt,
            sample_steps=sample_steps,
            lora=lora_r if lora else None,
            merge_lora=lora_merge,
            on_sample=partial(_tell_sample, told),
            on_notice=partial(told.print, soft_wrap=True),
            progress=TerminalProgress(told),
            **_with_shortcuts(flags, shortcuts),
        )
    except ValueError as error:
        raise ValueError(in_options(str(error))) from error
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    _tell_end(result)


def _tell_end(result: "TrainingResult") -> None:
    if os.environ.get("RANK", "0") == "0":
        typer.echo(_end_of(result), err=result.interrupted)
    if result.interrupted:
        raise typer.Exit(130)  # as of Ctrl-C elsewhere


def _tell_sample(told: Console, step: int, text: str) -> None:
    told.print(f"step {step} writes: {printable(' '.join(text.split()))}", soft_wrap=True)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _start(
    init_from: str | None,
    preset: str | None,
    model: str | None,
    sizes: dict[str, int],
    block_size: int | None,
) -> tuple[Any, dict[str, int] | None]:
    """The model to start from, and in which sizes it differs from the preset of this name."""
    from ..training import setup

    if sum(name is not None for name in (init_from, preset, model)) > 1:
        raise ValueError("--init-from has weights and --preset has none; give one of the two")
    if model:  # what it means depends on what is there
        init_from, preset = (model, None) if setup.is_saved(model) else (None, model)
    if init_from and sizes:
        names, them = " and ".join(map(in_options, sizes)), "them" if len(sizes) > 1 else "it"
        raise ValueError(f"{names} cannot change the sizes of pretrained weights; leave {them} out")
    if init_from:
        return setup.pretrained(init_from), None
    if preset:
        return setup.Preset(preset), sizes
    positions = _given({"max_position_embeddings": block_size})
    return setup.Preset("gpt2"), {**setup.SMALL, **sizes, **positions}


def _with_shortcuts(flags: dict[str, Any], shortcuts: dict[str, Any]) -> dict[str, Any]:
    """Flags of `TrainingArguments`, with those that have a short name here."""
    for short, value in _given(shortcuts).items():
        if _FLAGS[short] in flags:
            raise ValueError(f"{in_options(short + '=')} is {in_options(_FLAGS[short])}; give one")
        flags[_FLAGS[short]] = value
    return flags


def in_options(text: str) -> str:
    """What Python says of arguments of `train`, in words of the command line."""
    from ..training.run import train as in_python
    from ..training.setup import TrainingArguments

    names = [*inspect.signature(in_python).parameters, *_FLAGS, *options.FIELDS]
    names += [field.name for field in fields(TrainingArguments)]
    return options.in_options(text, names)


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
        f"checkpoints are in {printable(str(result.folder))}"
    )


def clear_cache(
    folder: Annotated[
        str | None, typer.Argument(metavar="FOLDER", help="Where they are, if elsewhere.")
    ] = None,
) -> None:
    """Remove the token ids that `train` has kept.

    They serve trainings on the same texts.
    """
    from ..training import corpus

    place = corpus.CACHE if folder is None else Path(folder)
    if folder is not None and not place.is_dir():
        raise ValueError(f"there is no folder {folder}; give the one with the token ids, or none")
    removed = corpus.clear_cache(place)
    shown, size = printable(str(place)), f"{removed / 1e6:,.1f} MB"
    typer.echo(f"removed {size} from {shown}" if removed else f"{shown} holds no token ids")
