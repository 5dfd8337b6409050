"""English that comes with every Python: its manual, and the docstrings of its standard library.

The manual is `pydoc_data.topics`, from which `help("for")` prints. Both have Python's own licence.
"""

import ast
import json
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics

from ..files import new_file

# A line of signs, as under headings.
_LINE = re.compile(r"^[^\w\n]{4,}\n", re.MULTILINE)

# Tests, and what was installed beside the standard library.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def python_texts() -> list[str]:
    """The topics of the manual, and a text of each module's docstrings; no paragraph comes twice.

    Topics hold sections that are topics too, and docstrings are copied from class to class.
    """
    found, met = [], set()
    for text in chain((topics[name] for name in sorted(topics)), _of_modules()):
        parts = _LINE.sub("", text).split("\n\n")
        fresh = [part for part in dict.fromkeys(parts) if part not in met]
        met.update(fresh)
        found.append("\n\n".join(fresh))
    return [text for text in found if text.strip()]


def _of_modules() -> Iterator[str]:
    """The docstrings of each module of the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if _SKIPPED.isdisjoint(path.relative_to(library).parts):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of its source; they are for its authors
                module = ast.parse(path.read_bytes())
            yield "\n\n".join(_docstrings(module))


def _docstrings(node: _Documented) -> Iterator[str]:
    """Those of `node` and of the classes and functions in it, from top to bottom."""
    if text := ast.get_docstring(node):
        yield text
    for inner in node.body:
        if isinstance(inner, _Documented):
            yield from _docstrings(inner)


def write_texts(folder: Path, validation: float) -> tuple[Path, Path]:
    """Shuffle `python_texts` and write them to two files; one that is there stays as it is.

    Args:
        folder: where to write them.
        validation: part of the characters to validate on, in texts of their own.

    Returns:
        The files to train and to validate on, with a JSON object a line, its text under "text".
    """
    paths = folder / "training.jsonl", folder / "validation.jsonl"
    if not all(path.is_file() for path in paths):
        left, held_out = python_texts(), list[str]()
        random.Random(0).shuffle(left)
        wanted = validation * sum(len(text) for text in left)
        while sum(len(text) for text in held_out) < wanted:
            held_out.append(left.pop())
        folder.mkdir(parents=True, exist_ok=True)
        for path, part in zip(paths, (left, held_out), strict=True):
            with new_file(path) as unfinished:
                lines = (json.dumps({"text": text}) + "\n" for text in part)
                unfinished.write_text("".join(lines), encoding="utf-8")
    return paths


def read_texts(path: Path) -> list[str]:
    """The texts in a file of `write_texts`."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
