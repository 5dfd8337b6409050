"""Read a saved model of ours one tensor at a time, and write all but the weights of a new one."""

from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from ..files import without_progress_bars
from ..model.configuration_scratch_gpt import ScratchGPTConfig
from ..model.vocabulary_scratch_gpt import read_json, read_text
from .assemble import raise_if_any, shapes_of
from .folders import check_texts, read_config
from .hf_gpt2 import stored_tensors
from .sources import TOKENS, StoredTensor, told_as_error


def read_saved(folder: Path) -> tuple[ScratchGPTConfig, dict[str, StoredTensor]]:
    """The configuration and the tensors, by our names, of the language model saved in `folder`.

    A ValueError tells what is damaged, missing or left over.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing; name the folder of a saved model")
    kind, ours = read_json(read_text(path), str(path)).get("model_type"), "scratch_gpt"
    if kind != ours:
        raise ValueError(f"{path} is of a model of type {kind!r}; name the folder of a {ours}")
    check_texts(folder)
    config = read_config(folder)
    stored: dict[str, StoredTensor] = {}
    for tensor in stored_tensors(folder):
        in_base_model = not tensor.name.startswith(("model.", "lm_head."))
        stored[f"model.{tensor.name}" if in_base_model else tensor.name] = tensor
    with told_as_error(path):
        shapes = shapes_of(config, len(stored))
    raise_if_any(shapes.keys() - stored.keys(), f"{folder} lacks the tensors")
    left = [stored[name].name for name in stored.keys() - shapes.keys()]
    raise_if_any(left, f"config.json of {folder} has no place for")
    for name, shape in shapes.items():
        stored[name].check(shape)
    return config, stored


def check_model(source: str) -> None:
    """Raise a ValueError unless `source`, if it is a folder, holds what its config.json describes.

    transformers would make a model of any size before it looks at the weights.
    """
    folder, path = Path(source), Path(source) / "config.json"
    if not path.is_file():
        return
    check_texts(folder)
    content = read_json(read_text(path), str(path))
    if content.get("model_type") not in ("gpt2", "scratch_gpt"):
        return
    if content.get("is_encoder_decoder"):
        raise ValueError(f"{path}: is_encoder_decoder is set, and a GPT is a decoder only")
    config, stored = read_config(folder), stored_tensors(folder)
    numbers = sum(prod(tensor.shape) for tensor in stored)
    with told_as_error(path):
        asked = sum(map(prod, shapes_of(config, len(stored)).values()))
    is_packed = not all(tensor.dtype.is_floating_point for tensor in stored)
    if asked > numbers * (8 if is_packed else 1):  # a byte may hold several, of a few bits each
        raise ValueError(f"{path} describes {asked} parameters, and there are {numbers} numbers")


def save_all_but_weights(
    model_class: type[PreTrainedModel], config: Any, dtype: torch.dtype, source: Path, folder: Path
) -> None:
    """Write configurations and code of a model to `folder`.

    How `source` generates is kept, with the special tokens of `config` where it has none.
    """
    with torch.device("meta"):
        model = model_class(config).to(dtype)
    path = source / GENERATION_CONFIG_NAME
    if path.is_file():
        with told_as_error(path):
            generation_config = GenerationConfig.from_pretrained(source)
            for name in TOKENS:
                if getattr(generation_config, name) is None:
                    setattr(generation_config, name, getattr(config, name))
            generation_config.validate(strict=True)
        model.generation_config = generation_config
    with without_progress_bars():  # they would count no weights
        model.save_pretrained(folder, state_dict={})
