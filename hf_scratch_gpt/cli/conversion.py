"""`hf-scratch-gpt convert`, `export` and `verify`: the commands of `checkpoints`, as they are."""

import typer

# Options are theirs, and so is `--help`.
PASS_ON = dict(ignore_unknown_options=True, allow_extra_args=True, help_option_names=[])


def convert(context: typer.Context) -> None:
    """Convert a GPT-2 of any format to a saved model."""
    from ..checkpoints.commands import convert_command

    raise typer.Exit(convert_command(context.args, context.command_path))


def export(context: typer.Context) -> None:
    """Save a model as GPT-2, for programs without this package."""
    from ..checkpoints.commands import export_command

    raise typer.Exit(export_command(context.args, context.command_path))


def verify(context: typer.Context) -> None:
    """Compare a saved model with the GPT-2 it was made of."""
    from ..checkpoints.commands import verify_command

    raise typer.Exit(verify_command(context.args, context.command_path))
