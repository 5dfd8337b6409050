"""C++ that is compiled for this machine, and kept for the next process in the user's cache folder.

Compiling takes two or three seconds, loading what was kept some milliseconds.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

_SOURCES = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cpp", ".h"))
_SOURCE = Path(__file__).with_name("one_token.cpp")
_COMPILERS = ("g++", "clang++", "c++")
# The last three let functions of several numbers be computed at once. Sums keep their order, so
# that a row's is the same whichever way and by whichever thread it is read.
_FLAGS = (
    "-std=c++17 -O3 -march=native -fopenmp -shared -fPIC "
    "-fno-math-errno -fno-signed-zeros -fno-trapping-math"
)


def can_compile() -> bool:
    """Whether a C++ compiler is there; whether it can compile this, `compiled` finds out."""
    return shutil.which((_compiler() or [""])[0]) is not None


def _compiler() -> list[str]:
    """The command of the compiler that is asked for, or else of the first that is there."""
    return shlex.split(os.environ.get("CXX", "")) or list(filter(shutil.which, _COMPILERS))[:1]


@functools.cache
def compiled() -> ctypes.CDLL:
    """The library that `one_token.cpp` makes; once in a process.

    Raises:
        FileNotFoundError: there is no C++ compiler.
        RuntimeError: the compiler does not compile it, or the result cannot be loaded.
    """
    compiler = _compiler()
    if not can_compile():
        raise FileNotFoundError(
            f"no C++ compiler is there ({', '.join(compiler or _COMPILERS)}) to compile a step of "
            "generation with; install g++, or name a compiler in the environment variable CXX"
        )
    try:
        folder, key = _cache_folder(), _key(compiler)
        return _kept(folder, key) or _compile(compiler, folder, key)
    # Others may write there, programs may not be run from there, or the system does not tell.
    except (OSError, subprocess.SubprocessError, RuntimeError, AttributeError):
        return _compile(compiler)


def _cache_folder() -> Path:
    """The folder for libraries, the user's alone; an OSError if anybody else could write there."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "hf_scratch_gpt"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    user, found = os.geteuid(), folder.lstat()
    is_private = stat.S_ISDIR(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o700
    if not is_private or found.st_uid != user:
        raise PermissionError(f"{folder} is not the user's alone")
    for parent in folder.resolve().parents:  # whoever may write there can put another in its place
        found = parent.stat()
        is_open = found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX
        if found.st_uid not in (user, 0) or is_open:
            raise PermissionError(f"{parent} is open to others")
    return folder


def _key(compiler: list[str]) -> str:
    """A hash of all that the library depends on: sources, command, compiler and processor."""
    # The compiler tells its version, and what it takes `native` for.
    command = [*compiler, *_FLAGS.split(), "-v", "-E", "-x", "c++", os.devnull]
    told = subprocess.run(command, capture_output=True, check=True).stderr
    parts = [*(path.read_bytes() for path in _SOURCES), shlex.join(command).encode(), told]
    return _digest(b"".join(hashlib.sha256(part).digest() for part in parts))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _kept(folder: Path, key: str) -> ctypes.CDLL | None:
    """What an earlier process has kept; its name ends in a digest of its content."""
    for library in folder.glob(f"{key}-*.so"):
        found = library.lstat()
        is_own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
        if is_own and library.stem == f"{key}-{_digest(library.read_bytes())}":
            return ctypes.CDLL(str(library))
    return None


def _compile(compiler: list[str], keep: Path | None = None, key: str = "") -> ctypes.CDLL:
    """Compile the source and load it; keep it in the folder `keep`."""
    # Where a library that is loaded cannot be deleted, it stays.
    with tempfile.TemporaryDirectory(dir=keep, ignore_cleanup_errors=True) as folder:
        library = Path(folder) / "one_token.so"
        command = [*compiler, *_FLAGS.split(), str(_SOURCE), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"{shlex.join(command)} failed; name another compiler in the environment variable "
                f"CXX, one with OpenMP, such as GNU's g++. It said:\n{done.stderr}"
            )
        try:
            loaded = ctypes.CDLL(str(library))
        except OSError as error:
            raise RuntimeError(
                f"{error}; if programs may not be run from there, name another folder in TMPDIR; "
                "if a symbol is missing, name a compiler of C++, such as g++, in CXX"
            ) from error
        if keep is not None:
            with library.open("rb") as file:
                content = file.read()
                os.fsync(file.fileno())
            library.replace(keep / f"{key}-{_digest(content)}.so")
        return loaded
