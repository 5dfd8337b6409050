"""What a reader of a checkpoint format hands over."""

import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from hf_scratch_gpt import ScratchGPTConfig, ScratchGPTTokenizer


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in its file.

    Args:
        name: its name in the source.
        file: the file, for messages.
        shape: its shape there.
        read: reads it; each call reads it anew.
    """

    name: str
    file: str
    shape: tuple[int, ...]
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


def load_pickle(path: str) -> object:
    """What `torch.save` wrote to `path`: tensors and plain values only, mapped from the file.

    Raises:
        ValueError: it is no such file, or would run code.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            try:
                damaged = archive.testzip()
            except (zipfile.BadZipFile, EOFError, zlib.error) as error:
                raise ValueError(f"{path} is damaged ({error})") from None
        if damaged is not None:
            raise ValueError(f"{path}: {damaged} does not match its checksum: it is damaged")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises whatever its readers meet
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} is no file of tensors that torch can read without running code in it "
            f"({reason})"
        ) from None


def stored_tensors(tensors: dict[str, torch.Tensor], path: str) -> dict[str, StoredTensor]:
    """The tensors of a pickle at `path`, prefixes of torch.compile and DDP removed."""
    stored = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path}: {name} is a {type(tensor).__name__}, not a tensor")
        plain = name.replace("_orig_mod.", "").replace("module.", "")
        stored[plain] = StoredTensor(name, path, tuple(tensor.shape), partial(_same, tensor))
    return stored


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


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
