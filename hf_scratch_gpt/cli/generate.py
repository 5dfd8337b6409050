"""`hf-scratch-gpt generate`: let a model write."""

import sys
from typing import Annotated, Any

import typer

from . import speed


def generate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Folder or Hub id of a model of ours or a GPT-2."),
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="What to continue; - takes all of standard input. If not given, prompts are asked "
            "for in a terminal, and else read from standard input, one a line.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens to write at most.")
    ] = 200,
    temperature: Annotated[
        float, typer.Option(min=0, metavar="N", help="0 takes the likeliest token.")
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option(min=0, metavar="N", help="Choose among so many; 0 for all.")
    ] = 40,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, metavar="N", help="Choose among so probable.")
    ] = 1.0,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=2**32 - 1, metavar="N", help="The same seed writes the same texts."
        ),
    ] = 0,
    samples: Annotated[
        int, typer.Option(min=1, metavar="N", help="How many texts to write of a prompt.")
    ] = 1,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="A JSON object a text: with its ids and log-probabilities."),
    ] = False,
    plain: speed.Plain = False,
    fast: speed.Fast = False,
    weights: speed.Weights = None,
) -> None:
    """Continue prompts; the text is shown as it comes.

    Where its window is full, the model goes on from the last half of it.
    In a terminal, Ctrl-C stops a text and Ctrl-D ends; a model with a chat template
    keeps up a conversation there.
    """
    optimize = speed.wanted(plain, fast, weights)
    if 0 < temperature < 1e-5:  # logits divided by it may be infinite
        raise ValueError(f"--temperature {temperature} is too low; 0 takes the likeliest token")
    from .models import load
    from .writer import Writer, answer_terminal, everything, lines

    sampling: dict[str, Any] = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    if temperature == 0:
        sampling = dict.fromkeys(sampling)
    sampling |= dict(do_sample=temperature > 0, max_new_tokens=max_new_tokens)
    text = everything() if prompt == "-" else prompt
    network, tokenizer = load(model, optimize, weights)
    writer = Writer(model, network, tokenizer, seed, samples, as_json, sampling)
    if text is not None:
        writer.answer(text)
    elif sys.stdin.isatty():
        answer_terminal(writer)
    else:
        for line in lines():
            writer.answer(line)
