"""Read a GPT-2 in transformers' format, from a folder or the hub."""

from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from ..model.configuration_scratch_gpt import ScratchGPTConfig
from ..model.tokenization_scratch_gpt import ScratchGPTTokenizer
from ..model.vocabulary_scratch_gpt import read_json, read_text
from .pickles import Pickle
from .sources import WRAPPERS, GPT2Source, StoredTensor, by_plain_name, told_as_error

# OpenAI's sizes on the hub.
OFFICIAL = {
    "124M": "openai-community/gpt2",
    "355M": "openai-community/gpt2-medium",
    "774M": "openai-community/gpt2-large",
    "1558M": "openai-community/gpt2-xl",
}
_FILES = ["*.json", "*.txt", "*.tiktoken"]


def read_hf_gpt2(source: str) -> GPT2Source:
    """Open the folder or hub id `source`, with its vocabulary if it has one."""
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(OFFICIAL.get(source, source))
    config = _config(folder)
    stored: list[StoredTensor] = []
    for file in weight_files(folder):
        is_pickle = file.suffix != ".safetensors"
        stored += Pickle(str(file)).tensors() if is_pickle else safetensors(file)
    named = by_plain_name(stored, (*WRAPPERS, "transformer."))
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


def weight_files(folder: Path) -> list[Path]:
    """The folder's weight files, safetensors before pickles."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return [folder / single]
        if index.is_file():
            with told_as_error(index):
                shards = set(read_json(read_text(index), str(index))["weight_map"].values())
                for shard in shards:
                    if Path(shard).name != shard or not (folder / shard).is_file():
                        raise ValueError(f"{index} lists {shard}, which is missing beside it")
            return [folder / shard for shard in sorted(shards)]
    raise ValueError(f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin")


def safetensors(path: Path) -> list[StoredTensor]:
    """The tensors of the safetensors file `path`; the library maps them, and reads none yet."""
    stored = []
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is not a mapping
                tensor, read = file.get_tensor(name), partial(_read, path, name)
                stored.append(
                    StoredTensor(name, str(path), tuple(tensor.shape), tensor.dtype, read)
                )
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error})") from None
    return stored


def _read(path: Path, name: str) -> torch.Tensor:
    # Mapped anew each time: what was read stays in memory while the file is mapped.
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)
