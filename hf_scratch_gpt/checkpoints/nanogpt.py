"""Read a checkpoint of nanoGPT (github.com/karpathy/nanoGPT, train.py): `ckpt.pt`."""

from functools import partial
from pathlib import Path

import torch

from ..model.configuration_scratch_gpt import ScratchGPTConfig
from .digests import unchecked_files
from .sources import (
    WRAPPERS,
    GPT2Source,
    StoredTensor,
    by_plain_name,
    load_pickle,
    stored_tensors,
    take_tied_head,
    told_as_error,
)

# nanoGPT rounds GPT-2's vocabulary up to a multiple of 64; no text has the ids above.
_PADDED, _VOCABULARY = 50304, 50257


def read_nanogpt(source: str) -> GPT2Source:
    """Open the checkpoint at `source`, the file or its folder.

    Raises:
        ValueError: it is no checkpoint of nanoGPT; names the file.
    """
    path = str(Path(source) / "ckpt.pt") if Path(source).is_dir() else source
    content = load_pickle(path)
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise ValueError(f"{path} is no nanoGPT checkpoint: it lacks model or model_args")
    config = _config(content["model_args"], path)
    tensors = by_plain_name(stored_tensors(content["model"], path), (*WRAPPERS, "transformer."))
    dropped = {
        tensors.pop(name).name: "a causal mask, made anew for each text"
        for name in list(tensors)
        if name.endswith(".attn.bias")
    }
    opened = GPT2Source(
        "nanoGPT",
        path,
        config,
        tensors,
        biases_optional=not config.qkv_bias,
        dropped=dropped,
        unchecked=unchecked_files([Path(path)]),
    )
    take_tied_head(opened)
    if config.vocab_size == _PADDED:
        trim_vocabulary(opened, _VOCABULARY)
    return opened


def _config(arguments: object, path: str) -> ScratchGPTConfig:
    """The configuration that nanoGPT's `model_args` describe."""
    if not isinstance(arguments, dict):
        raise ValueError(f"{path}: model_args is a {type(arguments).__name__}, not a dictionary")
    sizes = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")
    if missing := [name for name in sizes if name not in arguments]:
        raise ValueError(f"{path}: model_args lack {', '.join(missing)}")
    with told_as_error(f"{path}: model_args"):
        return ScratchGPTConfig(
            **{name: arguments[name] for name in sizes[:-1]},
            max_position_embeddings=arguments["block_size"],
            drop_rate=float(arguments.get("dropout") or 0.0),
            qkv_bias=bool(arguments.get("bias", True)),
            hidden_act="gelu",  # the exact form, unlike OpenAI's
        )


def _first_rows(stored: StoredTensor, size: int) -> torch.Tensor:
    return stored.read()[:size]


def trim_vocabulary(source: GPT2Source, size: int) -> None:
    """Keep the first `size` rows of the embedding and of the output head of `source`."""
    for name in ("wte.weight", "lm_head.weight"):
        if (stored := source.tensors.get(name)) is None:
            continue
        if len(stored.shape) != 2 or stored.shape[0] < size:
            raise ValueError(f"{stored.where} has shape {list(stored.shape)}, below {size} rows")
        source.tensors[name] = StoredTensor(
            stored.name,
            stored.file,
            (size, *stored.shape[1:]),
            stored.dtype,
            partial(_first_rows, stored, size),
        )
        rows = stored.shape[0] - size
        source.dropped[f"{stored.name}, last {rows} rows"] = "padding of the vocabulary"
    end_of_text = size - 1
    config = source.config
    config.vocab_size = size
    config.bos_token_id = config.eos_token_id = config.pad_token_id = end_of_text
