"""`hf-scratch-gpt with`: tools of others that know the models of this package."""

import os
import runpy
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Annotated

import typer

# All that stands behind TOOL is the tool's.
PASS_ON = dict(ignore_unknown_options=True, allow_interspersed_args=False)
_STARTUP = str(Path(__file__).parent / "startup")


def with_tool(
    tool: Annotated[
        str, typer.Argument(metavar="TOOL", help="A command, a module or a file of Python.")
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGS", help="What the tool is given.")
    ] = None,
) -> None:
    """Run a Python tool that then knows the models of this package.

    with lm_eval --model hf ..., with trl sft ..., with transformers chat ...

    It works under a launcher too: accelerate launch -m hf_scratch_gpt with TOOL ...
    Processes that the tool starts know the models as well, but for a Python that
    is started with -E, -I or -S.
    """
    # Processes that the tool starts register by this; in this one, importing the package has.
    paths = [_STARTUP, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, paths)))
    commands = metadata.entry_points(group="console_scripts", name=tool)
    is_file = tool.endswith(".py") and Path(tool).is_file()
    here = str(Path(tool).resolve().parent if is_file else Path.cwd())
    if not (commands or sys.flags.safe_path or here in sys.path):
        sys.path.insert(0, here)  # as Python does
    if not (commands or is_file or _is_module(tool)):
        is_here = tool in sys.modules or not tool.replace("-", "_").isidentifier()
        is_here = is_here or util.find_spec(tool) is not None
        remedy = "give another" if is_here else f"pip install {tool}"
        raise ValueError(f"{tool!r} is not a command, a module or a file of Python here; {remedy}")
    sys.argv = [tool, *(arguments or [])]
    try:
        if commands:
            sys.exit(next(iter(commands)).load()())
        elif is_file:
            runpy.run_path(tool, run_name="__main__")
        else:
            runpy.run_module(tool, run_name="__main__", alter_sys=True)
    except Exception as error:  # it is the tool's, to be shown in full as without us
        behind = error.__traceback__ and error.__traceback__.tb_next
        sys.excepthook(type(error), error.with_traceback(behind), behind)
        raise SystemExit(1) from None


def _is_module(name: str) -> bool:
    """Whether `python -m` would find a module of this name to run."""
    try:
        spec = util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = util.find_spec(f"{name}.__main__")
    except (ImportError, ValueError):  # the package that it would be in is missing; "" and ".a"
        return False
    return spec is not None
