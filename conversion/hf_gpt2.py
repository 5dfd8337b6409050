"""Read a GPT-2 in transformers' format, from a folder or the hub."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from hf_scratch_gpt import ScratchGPTConfig, ScratchGPTTokenizer

from .digests import unchecked_files
from .sources import GPT2Source, StoredTensor, load_pickle, stored_tensors
from .weights import DTYPES

# OpenAI's sizes on the hub.
OFFICIAL = {
    "124M": "openai-community/gpt2",
    "355M": "openai-community/gpt2-medium",
    "774M": "openai-community/gpt2-large",
    "1558M": "openai-community/gpt2-xl",
}
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
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder / 'config.json'} is missing")
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = fields.get("model_type")
    except (ValueError, AttributeError):
        raise ValueError(f"{folder / 'config.json'} is no JSON object in UTF-8") from None
    if kind != "gpt2":
        raise ValueError(f"{source} is a model of type {kind!r}; only GPT-2 can be converted")
    config = ScratchGPTConfig.from_pretrained(folder)
    files = _weight_files(folder)
    tensors = {}
    for file in files:
        tensors.update(_safetensors(file) if file.suffix == ".safetensors" else _pickle(file))
    names = {name: name.removeprefix("transformer.") for name in tensors}
    by_name = {names[name]: tensor for name, tensor in tensors.items()}
    dropped = {
        by_name.pop(name).name: "a causal mask, made anew for each text"
        for name in list(by_name)
        if name.endswith((".attn.bias", ".attn.masked_bias"))
    }
    if config.tie_word_embeddings and "lm_head.weight" in by_name:
        dropped[by_name.pop("lm_head.weight").name] = "tied to the token embedding"
    vocabulary_files = ScratchGPTTokenizer.vocab_files_names.values()
    has_vocabulary = any((folder / name).is_file() for name in vocabulary_files)
    tokenizer = ScratchGPTTokenizer.from_pretrained(folder) if has_vocabulary else None
    return GPT2Source(
        "transformers GPT-2",
        source,
        config,
        by_name,
        inputs_first=True,
        dropped=dropped,
        tokenizer=tokenizer,
        unchecked=unchecked_files(files),
    )


def _download(hub_id: str) -> Path:
    """The folder to which the hub's `hub_id` was fetched, with one kind of weight files."""
    folder = Path(snapshot_download(hub_id, allow_patterns=[*_FILES, "*.safetensors"]))
    if not any(folder.glob("*.safetensors")):
        folder = Path(snapshot_download(hub_id, allow_patterns=[*_FILES, "*.bin"]))
    return folder


def _weight_files(folder: Path) -> list[Path]:
    """The folder's weight files, safetensors before pickles."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return [folder / single]
        if index.is_file():
            try:
                shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{index} is no index of weight files") from None
            for shard in shards:
                if Path(shard).name != shard or not (folder / shard).is_file():
                    raise ValueError(f"{folder / shard} is missing, and {index} lists it")
            return [folder / shard for shard in sorted(shards)]
    raise ValueError(f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin")


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    tensors = {}
    with _open(path) as file:
        for name in file.keys():  # noqa: SIM118  # it is no mapping
            stored = file.get_slice(name)
            kind = stored.get_dtype()
            if kind not in _DTYPES:
                raise ValueError(f"{path}: {name} holds {kind}; weights are {', '.join(DTYPES)}")
            tensors[name] = StoredTensor(
                name,
                str(path),
                tuple(stored.get_shape()),
                _DTYPES[kind],
                partial(_read, path, name),
            )
    return tensors


def _read(path: Path, name: str) -> torch.Tensor:
    # The file is opened for each tensor: its mapped pages count as memory until the last one goes.
    with _open(path) as file:
        return file.get_tensor(name)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is no complete safetensors file ({error})") from None


def _pickle(path: Path) -> dict[str, StoredTensor]:
    content = load_pickle(str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no state dict")
    return stored_tensors(content, str(path))
