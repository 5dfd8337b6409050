"""Read a GPT-2 in transformers' format, from a folder or the hub."""

from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from ..model.configuration_scratch_gpt import PRESET_ALIASES, ScratchGPTConfig
from ..model.tokenization_scratch_gpt import ScratchGPTTokenizer
from ..model.vocabulary_scratch_gpt import read_json, read_text
from .folders import check_texts
from .pickles import Pickle
from .sources import WRAPPERS, GPT2Source, StoredTensor, by_plain_name, told_as_error

# OpenAI's sizes on the hub.
OFFICIAL = {
    size: f"openai-community/{PRESET_ALIASES[size]}" for size in ("124M", "355M", "774M", "1558M")
}
_LARGEST_HEADER = 1 << 22  # that of GPT-2's largest size takes 80 thousand bytes
_FILES = ["*.json", "*.txt", "*.tiktoken"]


def read_hf_gpt2(source: str) -> GPT2Source:
    """Open the folder or hub id `source`, with its vocabulary if it has one."""
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(OFFICIAL.get(source, source))
    check_texts(folder)
    config = _config(folder)
    named = by_plain_name(stored_tensors(folder), (*WRAPPERS, "transformer."))
    opened = GPT2Source("transformers GPT-2", source, config, *named, inputs_first=True)
    if config.tie_word_embeddings:
        opened.untie_or_drop_head()
    vocabulary_files = ScratchGPTTokenizer.vocab_files_names.values()
    if any((folder / name).is_file() for name in vocabulary_files):
        with told_as_error(folder):
            opened.adopt(ScratchGPTTokenizer.from_pretrained(folder))
    return opened


def _config(folder: Path) -> ScratchGPTConfig:
    path = folder / "config.json"
    kind = read_json(read_text(path), str(path)).get("model_type")
    if kind == ScratchGPTConfig.model_type:
        raise ValueError(
            f"{folder} holds a {kind} model already, which needs no conversion; to refresh its "
            "code, load model and tokenizer with from_pretrained and save both with save_pretrained"
        )
    if kind != "gpt2":
        raise ValueError(f"{folder} is a model of type {kind!r}; only GPT-2 can be converted")
    with told_as_error(path):
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


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """The tensors of the folder's weight files, of which safetensors come before pickles."""
    stored: list[StoredTensor] = []
    for file in _weight_files(folder):
        is_pickle = file.suffix != ".safetensors"
        stored += Pickle(str(file)).tensors() if is_pickle else _safetensors(file)
    return stored


def _weight_files(folder: Path) -> list[Path]:
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return [folder / single]
        if index.is_file():
            files = read_json(read_text(index), str(index)).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
                raise ValueError(f"{index} should give each tensor's file in weight_map")
            for shard in files.values():
                if Path(shard).name != shard or not (folder / shard).is_file():
                    raise ValueError(f"{index} lists {shard}, which is missing beside it")
            return [folder / shard for shard in sorted(set(files.values()))]
    raise ValueError(f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin")


def _safetensors(path: Path) -> list[StoredTensor]:
    # The library maps them, and reads none yet.
    stored = []
    with path.open("rb") as begin:
        header = int.from_bytes(begin.read(8), "little")
    if header > _LARGEST_HEADER:
        raise ValueError(f"{path} has a header of {header} bytes, over {_LARGEST_HEADER}")
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is not a mapping
                tensor, read = file.get_tensor(name), partial(_read, path, name)
                shape = tuple(tensor.shape)
                stored.append(StoredTensor(name, str(path), shape, tensor.dtype, read))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error})") from None
    return stored


def _read(path: Path, name: str) -> torch.Tensor:
    # Mapped anew each time: what was read stays in memory while the file is mapped.
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)
