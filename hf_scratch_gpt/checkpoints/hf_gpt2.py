"""Read a GPT-2 in transformers' format, from a folder or the hub."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import GPT2Config

from ..model.configuration_scratch_gpt import ScratchGPTConfig
from ..model.vocabulary_scratch_gpt import read_json, read_text
from .folders import check_texts
from .hub import DIGESTS, fetch, hub_id
from .pickles import Pickle
from .sources import WRAPPERS, GPT2Source, StoredTensor, by_plain_name, gpt2, told_as_error
from .vocabularies import has_vocabulary, take_vocabulary

_LARGEST_HEADER = 1 << 22  # that of GPT-2's largest size takes 80 thousand bytes
# What a config.json says of the model itself, by GPT-2's names and transformers' general ones.
_KEPT = {*GPT2Config.__annotations__, *GPT2Config.attribute_map}
# What every config.json has besides.
_USUAL = {"architectures", "dtype", "id2label", "label2id", "model_type", "n_ctx", "torch_dtype"}
_USUAL |= {"_name_or_path", "task_specific_params", "tokenizer_class", "transformers_version"}
# Heads of GPT-2 that give no logits of tokens, and what reads them (the last leaves it out).
_OTHER_HEADS = {
    "score.weight": "ScratchGPTForSequenceClassification",
    "classifier.weight": "ScratchGPTForTokenClassification",
    "qa_outputs.weight": "ScratchGPTForQuestionAnswering",
    "multiple_choice_head.summary.weight": "GPT2LMHeadModel",
}


def read_hf_gpt2(source: str) -> GPT2Source:
    """Open the folder or hub id `source`, with its vocabulary if it has one."""
    is_here = Path(source).is_dir()
    folder = Path(source) if is_here else fetch(source)
    check_texts(folder)
    fields = _fields(folder)
    kept = {name: value for name, value in fields.items() if name in _KEPT}
    if "n_ctx" in fields:  # where the oldest files have the number of positions
        kept.setdefault("n_positions", fields["n_ctx"])
    with told_as_error(folder / "config.json"):
        config, theirs = ScratchGPTConfig(**kept), gpt2(**kept)
    named = by_plain_name(stored_tensors(folder), (*WRAPPERS, "transformer."))
    opened = GPT2Source("transformers GPT-2", source, config, theirs, *named, inputs_first=True)
    for head in opened.tensors.keys() & _OTHER_HEADS.keys():
        remedy = f"load it with {_OTHER_HEADS[head]}.from_pretrained, and call save_pretrained"
        raise ValueError(f"{folder} has the head of another task, {head}; {remedy}")
    if not is_here and (digest := DIGESTS.get(hub_id(source))):
        opened.digests[str(folder / "model.safetensors")] = digest
        opened.notes.append(f"matched  {hub_id(source)}, OpenAI's weights by their SHA-256")
    if left_out := sorted(fields.keys() - _KEPT - _USUAL):
        opened.notes.append(f"left out {', '.join(left_out)} of config.json")
    if config.tie_word_embeddings:
        opened.untie_or_drop_head()
    if has_vocabulary(folder):
        take_vocabulary(opened, str(folder))
    return opened


def _fields(folder: Path) -> dict[str, Any]:
    """The fields of the GPT-2's `config.json` in `folder`."""
    path, adapter = folder / "config.json", folder / "adapter_config.json"
    if adapter.is_file() and not path.is_file():
        base = read_json(read_text(adapter), str(adapter)).get("base_model_name_or_path")
        raise ValueError(
            f"{folder} is an adapter of {base}; merge it first: load both with PeftModel, call "
            "merge_and_unload and save_pretrained, and convert what that wrote"
        )
    fields: dict[str, Any] = read_json(read_text(path), str(path))
    kind = fields.get("model_type")
    if kind == ScratchGPTConfig.model_type:
        raise ValueError(
            f"{folder} holds a {kind} model already, which needs no conversion; to refresh its "
            "code, load model and tokenizer with from_pretrained and save both with save_pretrained"
        )
    if kind != "gpt2":
        raise ValueError(f"{folder} is a model of type {kind!r}; only GPT-2 can be converted")
    return fields


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """The tensors of the folder's weight files, of which safetensors come before pickles."""
    stored: list[StoredTensor] = []
    for file in weight_files(folder):
        is_pickle = file.suffix != ".safetensors"
        stored += Pickle(str(file)).tensors() if is_pickle else safetensors(file)
    return stored


def weight_files(folder: Path) -> list[Path]:
    """The folder's weight files, safetensors before pickles."""
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


def safetensors(path: Path) -> list[StoredTensor]:
    """The tensors of the safetensors file `path`; the library maps them, and reads none yet."""
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
