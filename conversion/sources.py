"""What a reader of a checkpoint format hands over, and what the readers share."""

import mmap
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path

import torch

from hf_scratch_gpt import ScratchGPTConfig, ScratchGPTTokenizer


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in its file.

    Args:
        name: its name in the source.
        file: the file, for messages.
        shape: its shape there.
        dtype: its data type there.
        read: reads it; each call reads it anew.
    """

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def where(self) -> str:
        """File and name, for messages."""
        return f"{self.file}: {self.name}"


@dataclass
class GPT2Source:
    """A GPT-2 in any format, opened but not read.

    Args:
        origin: the format, in words.
        path: the file, folder or hub id.
        config: sizes and switches.
        tensors: by transformers' name in a base model, and `lm_head.weight`; a textbook's by its
            own.
        inputs_first: whether matrices are (inputs, outputs).
        textbook: whether names and layout are the textbook's.
        biases_optional: whether a missing bias is a bias of zeros.
        dropped: names of tensors left out on purpose, and why.
        tokenizer: the vocabulary that came with it.
        unchecked: files that nothing vouches for: neither the format nor a list of digests.
    """

    origin: str
    path: str
    config: ScratchGPTConfig
    tensors: dict[str, StoredTensor]
    inputs_first: bool = False
    textbook: bool = False
    biases_optional: bool = False
    dropped: dict[str, str] = field(default_factory=dict)
    tokenizer: ScratchGPTTokenizer | None = None
    unchecked: list[str] = field(default_factory=list)


def map_bytes(path: str | Path, offset: int, size: int) -> torch.Tensor:
    """The `size` bytes at `offset` of the file `path`, (size,) of uint8.

    They are mapped, not read: memory is taken as they are touched, and given back with the tensor.

    Raises:
        ValueError: the file ends before.
    """
    length = Path(path).stat().st_size
    if offset + size > length:
        raise ValueError(
            f"{path} has {length} bytes, and {size} were expected at {offset}: it is cut short"
        )
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    with Path(path).open("rb") as file:
        # A copy on write, since torch has no tensors that cannot be written to.
        area = mmap.mmap(
            file.fileno(), offset + size - start, access=mmap.ACCESS_COPY, offset=start
        )
    return torch.frombuffer(area, dtype=torch.uint8, offset=offset - start)


def map_tensor(
    path: str | Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """The contiguous tensor at byte `offset` of the file `path`, mapped as by `map_bytes`."""
    size = prod(shape) * dtype.itemsize
    return map_bytes(path, offset, size).view(dtype).reshape(shape)


def load_pickle(path: str, check: bool = True) -> object:
    """What `torch.save` wrote to `path`: plain values, and tensors that hold no data yet.

    Args:
        check: compare all data in it with its checksums.

    Raises:
        ValueError: it is no such file, is damaged, or would run code.
    """
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_archive(path, check)
    try:
        # Before PyTorch 1.6 files were no archives; those are read whole.
        device = "meta" if is_zip else "cpu"
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises whatever its readers meet
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} is no file of tensors that torch can read without running code in it "
            f"({reason})"
        ) from None


def _check_archive(path: str, checksums: bool) -> None:
    """Raise a ValueError if the archive `path` is not as torch.save writes it on our machines."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{path}: {member.filename} is compressed; torch.save stores")
                # torch would turn the bytes of tensors that hold none, and crash.
                is_order = member.filename.lower().endswith("byteorder")
                if is_order and archive.read(member) != b"little":
                    raise ValueError(f"{path} is big-endian; save it on a little-endian machine")
            damaged = archive.testzip() if checksums else None
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if damaged is not None:
        raise ValueError(f"{path}: {damaged} does not match its checksum: it is damaged")


def stored_tensors(tensors: dict[str, torch.Tensor], path: str) -> dict[str, StoredTensor]:
    """The tensors of a pickle at `path`, prefixes of torch.compile and DDP removed."""
    stored = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path}: {name} is a {type(tensor).__name__}, not a tensor")
        plain = name.replace("_orig_mod.", "").replace("module.", "")
        read = partial(_read_pickled, tensor, path)
        stored[plain] = StoredTensor(name, path, tuple(tensor.shape), tensor.dtype, read)
    return stored


def _read_pickled(tensor: torch.Tensor, path: str) -> torch.Tensor:
    """`tensor`, its data taken from the archive `path` if it holds none."""
    if not tensor.is_meta:
        return tensor
    storage = tensor.untyped_storage()
    assert storage._checkpoint_offset is not None, "torch.load sets it for the device meta"
    data = map_bytes(path, storage._checkpoint_offset, storage.nbytes()).view(tensor.dtype)
    return data.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def take_tied_head(
    source: GPT2Source, head: str = "lm_head.weight", embedding: str = "wte.weight"
) -> None:
    """Drop the output head of `source` if it repeats the token embedding; else untie them."""
    if head not in source.tensors or embedding not in source.tensors:
        return
    if torch.equal(source.tensors[head].read(), source.tensors[embedding].read()):
        source.dropped[source.tensors.pop(head).name] = "the same as the token embedding"
    else:
        source.config.tie_word_embeddings = False
