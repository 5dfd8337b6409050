"""`hf-scratch-gpt info`: how large models are and what they cost."""

import json
from typing import Annotated

import typer
from rich.console import Console


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
    n_layer: Annotated[int | None, typer.Option(help="Blocks.")] = None,
    n_head: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
    n_embd: Annotated[int | None, typer.Option(help="Width.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Token ids.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Positions.")] = None,
    tie: Annotated[bool | None, typer.Option(help="Whether the head shares weights.")] = None,
    qkv_bias: Annotated[bool | None, typer.Option(help="Whether q, k and v add a bias.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain numbers as JSON.")] = False,
) -> None:
    """Show sizes and costs of models, side by side.

    Parameters, storage, cache, FLOPs, and memory and time to train. Only configurations are read.
    """
    from .size_table import find_config, show, summarize

    if (tokens is None) != (flops is None):
        raise ValueError("--tokens and --flops give a time together; give both or neither")
    given = {
        "num_hidden_layers": n_layer,
        "num_attention_heads": n_head,
        "hidden_size": n_embd,
        "vocab_size": vocab_size,
        "max_position_embeddings": block_size,
        "tie_word_embeddings": tie,
        "qkv_bias": qkv_bias,
    }
    overrides = {name: value for name, value in given.items() if value is not None}
    sizes = (batch_size, length, tokens, flops)
    summaries = {name: summarize(find_config(name, overrides), *sizes) for name in names}
    console = Console(highlight=False, markup=False)
    if as_json:
        console.out(json.dumps([{"name": name, **parts} for name, parts in summaries.items()]))
    else:
        show(console, summaries)
