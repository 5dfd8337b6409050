"""Files and folders that appear all at once or not at all, whenever their command is stopped."""

import ctypes
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from transformers.utils import logging

try:
    import fcntl
except ImportError:  # on Windows, what a killed command leaves has to be removed by hand
    fcntl = None  # type: ignore[assignment]

_LOCK = "lock"


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path for a file to be written at, which takes the place of `path` when all went well."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The SHA-256 of the file `path`, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def give_memory_back() -> None:
    """Return to the system what was freed, which glibc would keep for later."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers from showing progress bars of its own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def refuse_file(folder: Path) -> None:
    """Raise a ValueError if `folder`, or what would have to hold it, is a file."""
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"{place} is a file; choose another folder")


def destination(out: str | Path, overwrite: bool, sources: Iterable[str | Path] = ()) -> Path:
    """The folder `out` with links followed, after a look at whether it can be made.

    A folder that a killed command had put aside returns to its place.

    Args:
        out: the folder to make.
        overwrite: whether it may replace one that holds files.
        sources: what it is made from; hub ids may be among them.

    Raises:
        ValueError: `out` cannot be made, or holds what must be kept.
    """
    folder = Path(out).expanduser().resolve()
    refuse_file(folder)
    if Path.cwd().is_relative_to(folder):
        raise ValueError(f"{folder} is or holds the working directory; choose a folder inside it")
    if folder.is_mount():
        raise ValueError(f"{folder} is a mount point; choose a folder inside it")
    for source in sources:
        if Path(source).exists() and Path(source).resolve().is_relative_to(folder):
            raise ValueError(f"{folder} holds the source {source}; choose another folder")
    _restore(folder)
    if not overwrite and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists already; choose another folder or pass --overwrite")
    return folder


@contextmanager
def new_folder(out: Path, overwrite: bool = True) -> Iterator[Path]:
    """A path for a folder to be made at, which takes the place of `out` when all went well.

    Args:
        out: as `destination` returns it.
        overwrite: whether to replace what is there by then.

    Raises:
        ValueError: another command made `out` meanwhile, and it is not to be replaced.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(out)
    with (
        tempfile.TemporaryDirectory(
            dir=out.parent, prefix=f".{out.name}-", suffix=".unfinished"
        ) as unfinished,
        (Path(unfinished) / _LOCK).open("w") as lock,
    ):
        _lock(lock)
        complete = Path(unfinished) / out.name
        yield complete
        if overwrite:
            _replace(out, complete)
        else:
            _place(out, complete)


def _place(out: Path, complete: Path) -> None:
    """Put `complete` at `out`, where nothing may be but an empty folder."""
    with suppress(OSError):
        out.rmdir()  # which Windows does not do by renaming
    try:
        complete.rename(out)
    except OSError:
        raise ValueError(
            f"{out} was made by another command meanwhile; choose another folder or pass "
            "--overwrite"
        ) from None


def _replace(out: Path, complete: Path) -> None:
    """Put `complete` in the place of `out`; whatever happens, one of them is there in the end."""
    aside = _aside(out)
    try:
        if out.exists():
            shutil.rmtree(aside, ignore_errors=True)
            out.rename(aside)
        complete.rename(out)
    except BaseException:
        _restore(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _aside(out: Path) -> Path:
    """Where the old `out` waits until the new one has its place."""
    return out.with_name(f".{out.name}-replaced")


def _restore(out: Path) -> None:
    """Bring back what waits aside if `out` is gone."""
    if _aside(out).exists() and not out.exists():
        _aside(out).rename(out)


def _remove_abandoned(out: Path) -> None:
    """Remove what killed commands left of `out`; other folders and running commands stay."""
    # Eight random signs are what `tempfile` puts between.
    name = re.compile(rf"\.{re.escape(out.name)}-[a-z0-9_]{{8}}\.unfinished")
    for folder in out.parent.iterdir():
        if name.fullmatch(folder.name):
            with suppress(OSError), (folder / _LOCK).open("a") as lock:
                if _lock(lock):
                    shutil.rmtree(folder, ignore_errors=True)


def _lock(file: IO[str]) -> bool:
    """Lock `file` until it is closed or this process ends; False where that cannot be done."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, AttributeError):  # a running command has it; no locks here; Windows
        return False
    return True
