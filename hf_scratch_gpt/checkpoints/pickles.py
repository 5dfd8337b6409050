"""Read what `torch.save` wrote, one tensor at a time, without running code in it."""

import pickle
import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from .sources import StoredTensor, told_as_error

# Bytes to read before a file is mapped anew.
_FRESH = 1 << 28


class Record:
    """An object of a class that is not looked up, with the attributes that it was saved with."""

    def __setstate__(self, fields: dict[str, Any]) -> None:
        self.fields = fields


class _NoCode(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"it asks for {module}.{name}, and such code is not run")


def plain_content(path: Path) -> Any:
    """What the pickle `path` holds, of nothing but dictionaries, lists, numbers and texts."""
    with path.open("rb") as file, told_as_error(path):
        try:
            return _NoCode(file).load()
        except (EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"it is not a pickle ({error})") from None


class Pickle:
    """A file of `torch.save`, mapped into memory.

    What was read of a mapped file stays in memory, so it is mapped anew after some hundred
    megabytes. Files from before PyTorch 1.6 are not archives and are read whole.

    Raises:
        ValueError: it is not such a file, is damaged, or would run code.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._is_archive = zipfile.is_zipfile(path)
        if self._is_archive:
            _check_archive(path)
        self._touched = 0
        self.content = self._load()

    def _load(self) -> Any:
        options: dict[str, Any] = dict(map_location="cpu", mmap=self._is_archive, weights_only=True)
        try:
            unknown = get_unsafe_globals_in_checkpoint(self.path) if self._is_archive else []
            configs = [name for name in unknown if name.endswith("Config")]
            with safe_globals([(type(name, (Record,), {}), name) for name in configs]):
                return torch.load(self.path, **options)
        except FileNotFoundError:
            raise
        except Exception as error:  # torch raises whatever its readers meet
            reason = " ".join(str(error).split())[:200]
            what = f"{self.path} is not a file of tensors that torch can read without running code"
            raise ValueError(f"{what} in it ({reason})") from None

    def tensors(self, key: str | None = None) -> list[StoredTensor]:
        """The tensors of the state dict that the file holds, or holds as its entry `key`."""
        state = self.content if key is None else self.content[key]
        if not isinstance(state, dict):
            raise ValueError(f"{self.path} holds no state dict")
        stored = []
        for name, tensor in state.items():
            where, kind = f"{self.path}: {name}", type(tensor).__name__
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise ValueError(f"{where} is a {kind}; a state dict has tensors by name")
            if tensor.layout != torch.strided or tensor.is_quantized:
                raise ValueError(f"{where} holds {tensor.dtype}, {tensor.layout}; it must be dense")
            if tensor.is_meta:
                raise ValueError(f"{where} was saved from the device meta and holds no data")
            shape, read = tuple(tensor.shape), partial(self._read, key, name)
            stored.append(StoredTensor(name, self.path, shape, tensor.dtype, read))
        return stored

    def _read(self, key: str | None, name: str) -> torch.Tensor:
        if self._is_archive and self._touched > _FRESH:
            self.content, self._touched = None, 0
            self.content = self._load()
        state = self.content if key is None else self.content[key]
        self._touched += state[name].nbytes
        return state[name].detach()  # it may be a parameter


def _check_archive(path: str) -> None:
    """Raise a ValueError if the archive `path` is not one of torch.save, or is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{path}: {member.filename} is compressed; torch.save stores")
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
    except (zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
