"""What a reader of a checkpoint format hands over, and what the readers share."""

import mmap
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

from ..model.configuration_scratch_gpt import ScratchGPTConfig
from ..model.tokenization_scratch_gpt import ScratchGPTTokenizer

# What torch.compile and DistributedDataParallel put before the names of what they wrap.
WRAPPERS = ("_orig_mod.", "module.")
# Transformers gives a tokenizer that knows of no longest text 10^30 tokens.
_NO_LENGTH = 1e20
# Whole numbers and truth values occur in buffers, which are left out.
_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}


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
        own_name: transformers' name of a tensor, and the format's own if it differs, for messages.
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
    own_name: Callable[[str], str] = str

    def adopt(self, tokenizer: ScratchGPTTokenizer) -> None:
        """Take `tokenizer`, and from it the special tokens that the configuration lacks."""
        self.tokenizer = tokenizer
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self.config, name) is None:
                setattr(self.config, name, getattr(tokenizer, name))
        if tokenizer.model_max_length > _NO_LENGTH:
            tokenizer.model_max_length = self.config.max_position_embeddings


@contextmanager
def told_as_error(path: str | Path) -> Iterator[None]:
    """Tell whatever the content of the file `path` makes go wrong as a ValueError that names it."""
    try:
        yield
    except (
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
        RuntimeError,  # RecursionError too
        StrictDataclassError,
    ) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, ValueError) and str(path) in reason:
            raise
        raise ValueError(f"{path}: {reason[:300]}") from None


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


def stored_tensors(tensors: object, path: str) -> list[StoredTensor]:
    """The tensors of the state dict `tensors` that `load_pickle` found at `path`.

    Raises:
        ValueError: it is none, or a tensor has not its data in the file; names it.
    """
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} holds no state dict")
    places = _places(path) if zipfile.is_zipfile(path) else {}
    stored = []
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"{path}: {name} is a {type(tensor).__name__}; a state dict has tensors by name"
            )
        if tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{path}: {name} holds {tensor.dtype}, {tensor.layout}; weights are dense and "
                "floating-point"
            )
        if tensor.is_meta:
            _check_place(tensor, f"{path}: {name}", places)
        read = partial(_read_pickled, tensor, path)
        stored.append(StoredTensor(name, path, tuple(tensor.shape), tensor.dtype, read))
    return stored


def _places(path: str) -> dict[int, int]:
    """Where in the archive `path` each storage begins, and its size."""
    places, keys = {}, []
    with zipfile.ZipFile(path) as archive, Path(path).open("rb") as file:
        for member in sorted(archive.infolist(), key=lambda member: member.header_offset):
            if "/data/" in member.filename:
                file.seek(member.header_offset + 26)
                name_and_extra = struct.unpack("<HH", file.read(4))
                places[member.header_offset + 30 + sum(name_and_extra)] = member.file_size
                keys.append(member.filename.rpartition("/")[2])
        calculated = any(name.endswith(".format_version") for name in archive.namelist())
    # Of files that give the version of their format, torch calculates where storages begin; in
    # another order it would take one for another.
    if calculated and keys != [str(number) for number in range(len(keys))]:
        raise ValueError(f"{path} was packed anew in another order; torch.load and save it again")
    return places


def _check_place(tensor: torch.Tensor, where: str, places: dict[int, int]) -> None:
    """Raise a ValueError unless the data of `tensor` is one of `places` of its archive."""
    storage = tensor.untyped_storage()
    start = getattr(storage, "_checkpoint_offset", None)
    if start is None:
        raise ValueError(f"{where} was saved from the device meta and holds no data")
    if start not in places:
        raise ValueError(
            f"{where} is not where torch.save puts it: the file was packed anew; torch.load and "
            "save it again"
        )
    # On the device meta a storage grows to what a tensor claims.
    if storage.nbytes() != places[start] or places[start] % tensor.dtype.itemsize:
        raise ValueError(
            f"{where} takes {storage.nbytes()} bytes, and the file has {places[start]} for it"
        )


def _read_pickled(tensor: torch.Tensor, path: str) -> torch.Tensor:
    """`tensor`, its data taken from the archive `path` if it holds none."""
    if not tensor.is_meta:
        return tensor
    storage = tensor.untyped_storage()
    assert storage._checkpoint_offset is not None, "stored_tensors looks"
    data = map_bytes(path, storage._checkpoint_offset, storage.nbytes()).view(tensor.dtype)
    return data.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def by_plain_name(
    tensors: Iterable[StoredTensor], prefixes: tuple[str, ...] = WRAPPERS
) -> dict[str, StoredTensor]:
    """`tensors` by their names without any of `prefixes`.

    Raises:
        ValueError: two have the same name then; names both.
    """
    named: dict[str, StoredTensor] = {}
    for tensor in tensors:
        name = tensor.name
        while name.startswith(prefixes):
            prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
            name = name.removeprefix(prefix)
        if name in named:
            raise ValueError(
                f"{named[name].where} and {tensor.where} are both {name}; remove one of them"
            )
        named[name] = tensor
    return named


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
