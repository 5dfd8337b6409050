"""`hf-scratch-gpt new`: a package for a model of one's own."""

from typing import Annotated

import typer


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the package, such as my_gpt.")],
    out: Annotated[str, typer.Argument(metavar="DIR", help="Folder to write.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DIR if it is there.")
    ] = False,
) -> None:
    """Write a model plugin of your own, to begin with.

    It is this package's model under another name, with tests, and imports nothing of this package.
    """
    from ..messages import printable
    from ..scaffold import class_name, new_package

    folder = printable(str(new_package(name, out, overwrite)))
    typer.echo(
        f"{folder} holds the package {name}, with {class_name(name)}ForCausalLM\n"
        f"Try there: pip install -e '.[test]' && pytest\n"
        f"Then change {name}/blocks_{name}.py"
    )
