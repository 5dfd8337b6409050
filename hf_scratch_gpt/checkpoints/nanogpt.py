"""Read a checkpoint of nanoGPT (github.com/karpathy/nanoGPT, train.py): `ckpt.pt`."""

from pathlib import Path
from typing import Any

from ..model.configuration_scratch_gpt import ScratchGPTConfig
from .pickles import Pickle
from .sources import WRAPPERS, GPT2Source, by_plain_name, told_as_error

# nanoGPT rounds GPT-2's vocabulary up to a multiple of 64; no text has the ids above.
_PADDED, _VOCABULARY = 50304, 50257


def read_nanogpt(source: str) -> GPT2Source:
    """Open the checkpoint at `source`, the file or its folder."""
    path = str(Path(source) / "ckpt.pt") if Path(source).is_dir() else source
    pickle = Pickle(path)
    if not isinstance(pickle.content, dict) or not {"model", "model_args"} <= pickle.content.keys():
        raise ValueError(f"{path} is not a nanoGPT checkpoint: it lacks model or model_args")
    config = _config(pickle.content["model_args"], path)
    named = by_plain_name(pickle.tensors("model"), (*WRAPPERS, "transformer."))
    opened = GPT2Source("nanoGPT", path, config, *named, biases_optional=not config.qkv_bias)
    opened.untie_or_drop_head()
    if config.vocab_size == _PADDED:
        opened.trim_vocabulary(_VOCABULARY)
    return opened


def _config(arguments: Any, path: str) -> ScratchGPTConfig:
    """The configuration that nanoGPT's `model_args` describe."""
    sizes = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")
    with told_as_error(f"{path}: model_args"):
        if missing := [name for name in sizes if name not in arguments]:
            raise ValueError(f"lacks {', '.join(missing)}")
        return ScratchGPTConfig(
            **{name: arguments[name] for name in sizes[:-1]},
            max_position_embeddings=arguments["block_size"],
            drop_rate=float(arguments.get("dropout") or 0.0),
            qkv_bias=bool(arguments.get("bias", True)),
            hidden_act="gelu",  # the exact form, unlike OpenAI's
        )
