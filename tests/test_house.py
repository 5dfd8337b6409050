"""The rules of the house: what may import what, what docstrings tell."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import hf_scratch_gpt
from hf_scratch_gpt import (
    ScratchGPTConfig,
    evaluation,
    inspection,
    scaffold,
    sizing,
    training,
    writing,
)
from hf_scratch_gpt.checkpoints import convert, readers

PACKAGE = Path(__file__).parent.parent / "hf_scratch_gpt"
FILES = sorted(PACKAGE.rglob("*.py"))
TOP = [path.name for path in PACKAGE.glob("*.py")]
MODEL = sorted((PACKAGE / "model").glob("*.py"))
# The one file that may name operators of torch which are not public.
PRIVATE = PACKAGE / "engine" / "private_ops.py"


def names_of_torch(path: Path) -> set[str]:
    """Dotted names in a file that begin with `torch`, imported ones among them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("torch.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_of_torch_stand_in_one_file(path):
    private = {n for n in names_of_torch(path) if re.search(r"\._(?!_)|\.ops\.", n)}
    assert path == PRIVATE or not private


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_imports_the_face(path):
    """A wing that did would draw in all others."""
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert (node.module, node.level) != ("hf_scratch_gpt", 0)
            if node.module is None and node.level == depth:
                names = [alias.name for alias in node.names]
                assert all((PACKAGE / name).is_dir() or f"{name}.py" in TOP for name in names)
        elif isinstance(node, ast.Import):
            assert "hf_scratch_gpt" not in [alias.name for alias in node.names]


def ours(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level]
    assert all(node.level == 1 for node in imports), f"{path} imports from outside of model/"
    return {str(node.module) for node in imports}


def test_the_model_imports_nothing_else_of_ours():
    modules = {path.stem for path in MODEL}
    assert all(ours(path) <= modules for path in MODEL)
    assert ours(PACKAGE / "model" / "blocks_scratch_gpt.py") == {"configuration_scratch_gpt"}
    assert len(modules - {"__init__"}) <= 8


CALLED = [getattr(hf_scratch_gpt, name) for name in hf_scratch_gpt.__all__]
for wing in (convert, evaluation, inspection, readers, scaffold, sizing, training, writing):
    own = [thing for name, thing in vars(wing).items() if callable(thing) and name[0] != "_"]
    CALLED += [each for each in own if each.__module__.startswith(wing.__name__)]


@pytest.mark.parametrize("thing", CALLED, ids=lambda thing: thing.__qualname__)
def test_docstrings_of_what_users_call_tell_of_every_argument(thing):
    """By its name; ruff's rule D417 asks for a list, even of what the summary has said.

    A configuration is told by its type; what a class hands on to that of transformers, there.
    """
    arguments = inspect.signature(thing).parameters.values()
    if thing is ScratchGPTConfig:
        arguments = [each for each in arguments if each.name in vars(thing)["__annotations__"]]
    for argument in arguments:
        is_told = argument.annotation in (ScratchGPTConfig, "ScratchGPTConfig")
        is_told |= isinstance(thing, type) and argument.kind is argument.VAR_KEYWORD
        assert is_told or re.search(rf"\b{argument.name}\b", thing.__doc__), argument
