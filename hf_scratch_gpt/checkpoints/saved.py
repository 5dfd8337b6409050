"""Read a saved model of ours one tensor at a time, and write all but the weights of a new one."""

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from ..files import without_progress_bars
from ..model.configuration_scratch_gpt import ScratchGPTConfig
from ..model.vocabulary_scratch_gpt import read_json, read_text
from .assemble import shapes_of
from .hf_gpt2 import safetensors, weight_files
from .sources import TOKENS, StoredTensor, told_as_error


def read_saved(folder: Path) -> tuple[ScratchGPTConfig, dict[str, StoredTensor]]:
    """The configuration and the tensors, by our names, of the language model saved in `folder`.

    A ValueError tells what is damaged, missing or left over.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing; name the folder of a saved model")
    fields = read_json(read_text(path), str(path))
    kind, ours = fields.get("model_type"), ScratchGPTConfig.model_type
    if kind != ours:
        raise ValueError(f"{path} is of a model of type {kind!r}; name the folder of a {ours}")
    with told_as_error(path):
        config = ScratchGPTConfig.from_pretrained(folder)
        shapes = shapes_of(config)
    stored: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        if file.suffix != ".safetensors":
            raise ValueError(
                f"{file} is not a safetensors file; save the model with save_pretrained"
            )
        for tensor in safetensors(file):
            in_base_model = not tensor.name.startswith(("model.", "lm_head."))
            stored[f"model.{tensor.name}" if in_base_model else tensor.name] = tensor
    for name, shape in shapes.items():
        if name not in stored:
            raise ValueError(f"{folder} lacks the tensor {name}, which config.json asks for")
        stored[name].check(shape)
    for name in stored.keys() - shapes.keys():
        raise ValueError(f"{stored[name].where} has no place in the model of config.json")
    return config, stored


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
