"""The options that say how fast a model writes, of the commands that let it write."""

from typing import Annotated, Literal

import typer

Plain = Annotated[
    bool, typer.Option("--plain", help="Write by PyTorch alone, without compiled code.")
]
Fast = Annotated[
    bool, typer.Option("--fast", help="Compile, also on a GPU; an error if that fails.")
]
Weights = Annotated[
    Literal["int8", "int4", "fp8"] | None,
    typer.Option(metavar="TYPE", help="Fast, in int8, int4 or fp8."),
]


def wanted(plain: bool, fast: bool, weights: str | None) -> bool | None:
    """Whether to optimize a model, as `models.load` takes it: None where it is possible."""
    if plain and (fast or weights):
        raise ValueError("--plain turns off what --fast and --weights ask for; leave it out")
    return False if plain else fast or None
