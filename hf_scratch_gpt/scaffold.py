"""A package for a model of one's own: the code of `model/` under another name, ready to change."""

import keyword
import re
from importlib.util import find_spec
from pathlib import Path

from .files import destination, new_folder

_HERE = Path(__file__).parent
_TEMPLATES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "init.py": "scratch_gpt/__init__.py",
    "test_model.py": "tests/test_scratch_gpt.py",
}


def new_package(name: str, out: str | Path, overwrite: bool = False) -> Path:
    """Write a package called `name`, with tests, to the folder `out`.

    It is a copy of this package's model, which works at once and imports nothing of it.

    Args:
        name: as Python imports it and as transformers' `model_type`, such as "my_gpt".
        out: the folder to make; links are followed.
        overwrite: whether it may replace one that holds files.

    Returns:
        The folder.

    Raises:
        ValueError: `name` cannot be a package's or is taken, or `out` cannot be made.
    """
    _check_name(name)
    folder = destination(out, overwrite)
    with new_folder(folder, overwrite) as unfinished:
        for path in sorted((_HERE / "model").glob("*_scratch_gpt.py")):
            _write(path, unfinished, f"scratch_gpt/{path.name}", name)
        for template, place in _TEMPLATES.items():
            _write(_HERE / "templates" / f"{template}.txt", unfinished, place, name)
    return folder


def class_name(name: str) -> str:
    """How the classes of the package `name` begin: "my_gpt" gives "MyGPT"."""
    parts = (part for part in name.split("_") if part)
    return "".join(part.upper() if part == "gpt" else part.capitalize() for part in parts)


def _check_name(name: str) -> None:
    if not re.fullmatch("[a-z][a-z0-9_]*[a-z0-9]", name) or keyword.iskeyword(name):
        raise ValueError(
            f"{name!r} cannot be the name of a package; use small letters, digits and _, such as "
            "my_gpt"
        )
    from transformers import CONFIG_MAPPING

    if name in CONFIG_MAPPING or find_spec(name) is not None:
        raise ValueError(
            f"{name!r} is taken, by a model of transformers or by an installed package; choose "
            "another, such as my_gpt"
        )


def _write(source: Path, folder: Path, place: str, name: str) -> None:
    # What the model says of the package it is in holds for the new one; the templates mean this.
    ours = "(hf_)?scratch_gpt" if source.suffix == ".py" else "(?<!hf_)scratch_gpt"

    def renamed(text: str) -> str:
        return re.sub(ours, name, text).replace("ScratchGPT", class_name(name))

    path = folder / renamed(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(renamed(source.read_text(encoding="utf-8")), encoding="utf-8")
