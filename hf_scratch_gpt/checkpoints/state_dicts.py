"""Read a GPT's state dict that torch.save wrote: a checkpoint of nanoGPT or of the textbook.

nanoGPT's `ckpt.pt` holds the sizes beside the weights (github.com/karpathy/nanoGPT, train.py). A
`.pth` file of the from-scratch textbook holds weights alone (Raschka, Build a Large Language Model
From Scratch, chapter 4); the number of heads is not among what they tell.
"""

import re
from pathlib import Path
from typing import Any

from ..model.configuration_scratch_gpt import PRESETS, ScratchGPTConfig
from .names import rules_of
from .pickles import Pickle
from .sources import WRAPPERS, GPT2Source, StoredTensor, by_plain_name, joined, told_as_error

# nanoGPT rounds GPT-2's vocabulary up to a multiple of 64; no text has the ids above.
_PADDED, _VOCABULARY = 50304, 50257


def read_nanogpt(source: str) -> GPT2Source:
    """Open the checkpoint at `source`, the file or its folder."""
    path = str(Path(source) / "ckpt.pt") if Path(source).is_dir() else source
    pickle = Pickle(path)
    if not isinstance(pickle.content, dict) or not {"model", "model_args"} <= pickle.content.keys():
        raise ValueError(f"{path} is not a nanoGPT checkpoint: it lacks model or model_args")
    config = _nanogpt_config(pickle.content["model_args"], path)
    named = by_plain_name(pickle.tensors("model"), (*WRAPPERS, "transformer."))
    opened = GPT2Source("nanoGPT", path, config, *named, biases_optional=not config.qkv_bias)
    opened.untie_or_drop_head()
    if config.vocab_size == _PADDED:
        opened.trim_vocabulary(_VOCABULARY)
    return opened


def _nanogpt_config(arguments: Any, path: str) -> ScratchGPTConfig:
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


def read_textbook(
    source: str, num_heads: int | None = None, preset: str | None = None
) -> GPT2Source:
    """Open the file `source`, of `num_heads` heads or of a published size, `preset`."""
    pickle = Pickle(source)
    is_wrapped = isinstance(pickle.content, dict) and "model_state_dict" in pickle.content
    left, dropped = by_plain_name(pickle.tensors("model_state_dict" if is_wrapped else None))
    for name in ("tok_emb.weight", "pos_emb.weight"):
        if name not in left or len(left[name].shape) != 2:
            raise ValueError(f"{source} is not a textbook GPT: it lacks a matrix {name}")
    layers = [re.match(r"trf_blocks\.(\d+)\.", name) for name in left]
    depth = max((int(layer[1]) for layer in layers if layer), default=0) + 1
    named: dict[str, StoredTensor] = {}
    for rule in rules_of(min(depth, len(left))):
        if all(name in left for name in rule.textbook):
            named[rule.gpt2] = joined([left.pop(name) for name in rule.textbook])
    vocabulary, width = named["wte.weight"].shape
    inner = named.get("h.0.mlp.c_fc.weight")
    heads, assumed = _heads(source, width, depth, num_heads, preset)
    with told_as_error(source):
        config = ScratchGPTConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=inner.shape[0] if inner and inner.shape else None,
            max_position_embeddings=named["wpe.weight"].shape[0],
            qkv_bias="h.0.attn.c_attn.bias" in named,
        )
    tensors = named | left
    opened = GPT2Source(f"textbook state dict{assumed}", source, config, tensors, dropped)
    opened.untie_or_drop_head()
    return opened


def _heads(
    source: str, width: int, depth: int, num_heads: int | None, preset: str | None
) -> tuple[int, str]:
    """How many attention heads there are, and a note if that is an assumption."""
    known = {sizes["hidden_size"]: sizes["num_attention_heads"] for sizes in PRESETS.values()}
    if preset is not None:
        published = ScratchGPTConfig.from_preset(preset)
        if (published.hidden_size, published.num_hidden_layers) != (width, depth):
            theirs = f"{published.num_hidden_layers} of width {published.hidden_size}"
            raise ValueError(
                f"{source} has {depth} layers of width {width}, and {preset} has {theirs}; pass "
                "--num-heads instead of --preset"
            )
    if num_heads is not None or preset is not None:
        return known[width] if num_heads is None else num_heads, ""
    if width not in known:
        raise ValueError(
            f"{source}: the tensors do not tell how many attention heads share the width {width}; "
            "pass --num-heads or --preset"
        )
    return known[width], f", {known[width]} heads assumed from the width {width}"
