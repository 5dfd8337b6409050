"""`hf-scratch-gpt generate`: let a model write."""

import sys
from functools import partial
from typing import Annotated

import typer
from rich.console import Console


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
