"""Read a model of ours from the folder that it is saved in, one tensor at a time."""

from pathlib import Path

import torch
from transformers import GenerationConfig, PretrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from ..model.configuration_scratch_gpt import ScratchGPTConfig
from ..model.modeling_scratch_gpt import ScratchGPTForCausalLM
from .hf_gpt2 import Reader, safetensors, weight_files
from .sources import StoredTensor, map_tensor, told_as_error


def read_saved(
    folder: Path, read: Reader = map_tensor
) -> tuple[ScratchGPTConfig, dict[str, StoredTensor]]:
    """The configuration and the tensors, by our names, of the language model saved in `folder`.

    Args:
        read: fetches a tensor from its file.

    Raises:
        ValueError: it is no model of ours, a file is damaged, or the tensors are not those that
            the configuration asks for; names them.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing; name the folder of a saved model")
    with told_as_error(path):
        kind = PretrainedConfig.get_config_dict(folder)[0].get("model_type")
        if kind != ScratchGPTConfig.model_type:
            raise ValueError(
                f"{path} is of a model of type {kind!r}; name the folder of a "
                f"{ScratchGPTConfig.model_type}"
            )
        config = ScratchGPTConfig.from_pretrained(folder)
        with torch.device("meta"):
            asked = ScratchGPTForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del asked["lm_head.weight"]
    stored: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        if file.suffix != ".safetensors":
            raise ValueError(f"{file} is no safetensors file; save the model with save_pretrained")
        stored |= {_in_language_model(tensor.name): tensor for tensor in safetensors(file, read)}
    _check(folder, asked, stored)
    return config, stored


def _in_language_model(name: str) -> str:
    """The name in a language model of the tensor `name`, which may be a base model's."""
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def _check(folder: Path, asked: dict[str, torch.Tensor], stored: dict[str, StoredTensor]) -> None:
    """Raise a ValueError unless the tensors `stored` are those `asked` for."""
    for name, tensor in asked.items():
        if name not in stored:
            raise ValueError(f"{folder} lacks the tensor {name}, which config.json asks for")
        if stored[name].shape != tensor.shape:
            raise ValueError(
                f"{stored[name].where} has shape {list(stored[name].shape)}, and config.json asks "
                f"for {list(tensor.shape)}"
            )
        if not stored[name].dtype.is_floating_point:
            raise ValueError(
                f"{stored[name].where} holds {stored[name].dtype}; weights are floating-point"
            )
    for name in stored.keys() - asked.keys():
        raise ValueError(f"{stored[name].where} has no place in the model of config.json")


def read_generation_config(folder: Path, config: ScratchGPTConfig) -> GenerationConfig | None:
    """How the model in `folder` generates, with the special tokens of `config` where it has none.

    None if `folder` does not say.

    Raises:
        ValueError: its file is damaged.
    """
    path = folder / GENERATION_CONFIG_NAME
    if not path.is_file():
        return None
    with told_as_error(path):
        read = GenerationConfig.from_pretrained(folder)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(read, name) is None:
                setattr(read, name, getattr(config, name))
        read.validate(strict=True)
    return read
