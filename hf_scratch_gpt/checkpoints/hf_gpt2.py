"""Read a GPT-2 in transformers' format, from a folder or the hub."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from ..model.configuration_scratch_gpt import ScratchGPTConfig
from ..model.tokenization_scratch_gpt import ScratchGPTTokenizer
from .digests import unchecked_files
from .sources import (
    WRAPPERS,
    GPT2Source,
    StoredTensor,
    by_plain_name,
    load_pickle,
    map_tensor,
    stored_tensors,
    take_tied_head,
    told_as_error,
)
from .weights import DTYPES

# OpenAI's sizes on the hub.
OFFICIAL = {
    "124M": "openai-community/gpt2",
    "355M": "openai-community/gpt2-medium",
    "774M": "openai-community/gpt2-large",
    "1558M": "openai-community/gpt2-xl",
}
# Gets file, byte, shape and data type.
Reader = Callable[[Path, int, tuple[int, ...], torch.dtype], torch.Tensor]
_FILES = ["*.json", "*.txt", "*.tiktoken"]
# By the names of safetensors; the whole numbers occur in buffers, which are left out.
_DTYPES = {
    **DTYPES,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_hf_gpt2(source: str) -> GPT2Source:
    """Open the folder or hub id `source`, with its vocabulary if it has one.

    Raises:
        OSError: there is no such folder or hub id.
        ValueError: it holds a model of another kind, or its files are damaged; names them.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(OFFICIAL.get(source, source))
    config = _config(folder)
    files = weight_files(folder)
    tensors = by_plain_name(
        (
            tensor
            for file in files
            for tensor in (safetensors(file) if file.suffix == ".safetensors" else _pickle(file))
        ),
        (*WRAPPERS, "transformer."),
    )
    dropped = {
        tensors.pop(name).name: "a causal mask, made anew for each text"
        for name in list(tensors)
        if name.endswith((".attn.bias", ".attn.masked_bias"))
    }
    opened = GPT2Source(
        "transformers GPT-2",
        source,
        config,
        tensors,
        inputs_first=True,
        dropped=dropped,
        unchecked=unchecked_files(files),
    )
    if config.tie_word_embeddings:
        take_tied_head(opened)
    vocabulary_files = ScratchGPTTokenizer.vocab_files_names.values()
    if any((folder / name).is_file() for name in vocabulary_files):
        with told_as_error(folder):
            opened.adopt(ScratchGPTTokenizer.from_pretrained(folder))
    return opened


def _config(folder: Path) -> ScratchGPTConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    with told_as_error(path):
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            kind = fields.get("model_type")
        except (ValueError, AttributeError, RecursionError):
            raise ValueError(f"{path} is no JSON object in UTF-8") from None
        if kind != "gpt2":
            raise ValueError(f"{folder} is a model of type {kind!r}; only GPT-2 can be converted")
        fields, _ = ScratchGPTConfig.get_config_dict(folder)
        # How attention is computed is a matter of the machine, not of the checkpoint.
        for name in ("attn_implementation", "_attn_implementation"):
            fields.pop(name, None)
        return ScratchGPTConfig(**fields)


def _download(hub_id: str) -> Path:
    """The folder to which the hub's `hub_id` was fetched, with one kind of weight files."""
    folder = Path(snapshot_download(hub_id, allow_patterns=[*_FILES, "*.safetensors"]))
    if not any(folder.glob("*.safetensors")):
        folder = Path(snapshot_download(hub_id, allow_patterns=[*_FILES, "*.bin"]))
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The folder's weight files, safetensors before pickles."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return [folder / single]
        if index.is_file():
            return [folder / shard for shard in _shards(index)]
    raise ValueError(f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin")


def _shards(index: Path) -> list[str]:
    """The names of the weight files that `index` lists."""
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        is_missing = [
            Path(shard).name != shard or not (index.parent / shard).is_file() for shard in shards
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index} is no index of weight files") from None
    if any(is_missing):
        shard = shards[is_missing.index(True)]
        raise ValueError(f"{index.parent / shard} is missing, and {index} lists it")
    return shards


def safetensors(path: Path, read: Reader = map_tensor) -> list[StoredTensor]:
    """The tensors of the safetensors file `path`, which `read` will fetch."""
    tensors = []
    with _open(path) as file:
        places = _places(path)
        for name in file.keys():  # noqa: SIM118  # it is no mapping
            stored = file.get_slice(name)
            kind = stored.get_dtype()
            if kind not in _DTYPES:
                raise ValueError(f"{path}: {name} holds {kind}; weights are {', '.join(DTYPES)}")
            shape, dtype = tuple(stored.get_shape()), _DTYPES[kind]
            fetch = partial(read, path, places[name], shape, dtype)
            tensors.append(StoredTensor(name, str(path), shape, dtype, fetch))
    return tensors


def _places(path: Path) -> dict[str, int]:
    """Where in the safetensors file `path`, which the library has checked, each tensor begins."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: 8 + length + fields["data_offsets"][0] for name, fields in header.items()}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is no complete safetensors file ({error})") from None


def _pickle(path: Path) -> list[StoredTensor]:
    return stored_tensors(load_pickle(str(path)), str(path))
