"""Arguments as a user writes them: never empty, and by the names of options in errors."""

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from typer.models import ArgumentInfo

# Texts, of which commands say more, and what belongs to a tool of others.
_MAY_BE_EMPTY = {"prompt", "text", "sample_prompt", "tool", "arguments"}

# Options whose names in Python are others.
FIELDS = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "block_size": "max_position_embeddings",
    "flops": "flops_per_second",
    "lora_merge": "merge_lora",
}


def in_words_of_the_user(command: Callable[..., None]) -> Callable[..., None]:
    """Let `command` refuse empty arguments, and tell of the others by the names of its options."""
    parameters = inspect.signature(command).parameters

    @functools.wraps(command)
    def call(**given: Any) -> None:
        for name, value in given.items():
            if name not in _MAY_BE_EMPTY and "" in (value if isinstance(value, list) else [value]):
                shown = _shown(name, parameters[name].annotation.__metadata__[0])
                raise ValueError(f"{shown} is empty; give a value, or leave it out")
        try:
            command(**given)
        except ValueError as error:
            used = {name for name, value in given.items() if value is not None}
            # Sizes belong together; where none is given, they are those of a file.
            names = parameters if used & FIELDS.keys() else used
            raise ValueError(in_options(str(error), names)) from error

    return call


def _shown(name: str, parameter: Any) -> str:
    """What help shows of a parameter with this `name` in Python."""
    if isinstance(parameter, ArgumentInfo):
        return parameter.metavar or name.upper()
    return next(iter(parameter.param_decls or ()), f"--{name.replace('_', '-')}")


def in_options(text: str, names: Iterable[str], others: Mapping[str, str] = FIELDS) -> str:
    """What Python says of arguments, in words of the command line: "block_size=8" is an option.

    Args:
        names: of options, as Python has them.
        others: further names in Python of these options.
    """
    options = {name: name for name in names}
    options |= {others[name]: name for name in names if name in others}

    def option(found: re.Match[str]) -> str:
        name, value = found.groups()
        if not value and "_" not in name:
            return found[0]  # a word of English
        return f"--{options[name].replace('_', '-')}{' ' if value else ''}"

    return re.sub(rf"(?<![\w/.'-])({'|'.join(options)})(= ?|(?![\w/.'-]))", option, text)
