"""Read the state dict of a GPT written along with the from-scratch textbook: a `.pth` file.

Its blocks are called `trf_blocks.0`, with `att.W_query`, `att.W_key` and `att.W_value` apart, and
its LayerNorms have `scale` and `shift` (Raschka, Build a Large Language Model From Scratch, chapter
4).
"""

import re
from pathlib import Path

from ..model.configuration_scratch_gpt import PRESETS, ScratchGPTConfig
from .digests import unchecked_files
from .sources import (
    GPT2Source,
    by_plain_name,
    load_pickle,
    stored_tensors,
    take_tied_head,
    told_as_error,
)


def read_textbook(
    source: str, num_heads: int | None = None, preset: str | None = None
) -> GPT2Source:
    """Open the file `source`.

    Args:
        source: the file.
        num_heads: attention heads, which the tensors do not tell.
        preset: a published size to take them from.

    Raises:
        ValueError: it is no such file, or the number of heads is not known.
    """
    content = load_pickle(source)
    if isinstance(content, dict) and "model_state_dict" in content:
        content = content["model_state_dict"]
    tensors = by_plain_name(stored_tensors(content, source))
    for name in ("tok_emb.weight", "pos_emb.weight"):
        if name not in tensors or len(tensors[name].shape) != 2:
            raise ValueError(f"{source} is no textbook GPT: it lacks a matrix {name}")
    vocabulary, width = tensors["tok_emb.weight"].shape
    layers = {
        int(match[1]) for name in tensors if (match := re.match(r"trf_blocks\.(\d+)\.", name))
    }
    inner = tensors.get("trf_blocks.0.ff.layers.0.weight")
    depth = max(layers, default=0) + 1
    if preset is not None:
        _check_preset(source, preset, width, depth)
    heads, assumed = _heads(source, width, num_heads, preset)
    with told_as_error(source):
        config = ScratchGPTConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=inner.shape[0] if inner and inner.shape else None,
            max_position_embeddings=tensors["pos_emb.weight"].shape[0],
            qkv_bias="trf_blocks.0.att.W_query.bias" in tensors,
        )
    dropped = {
        tensors.pop(name).name: "a causal mask, made anew for each text"
        for name in list(tensors)
        if name.endswith(".att.mask")
    }
    opened = GPT2Source(
        f"textbook state dict{assumed}",
        source,
        config,
        tensors,
        textbook=True,
        dropped=dropped,
        unchecked=unchecked_files([Path(source)]),
    )
    take_tied_head(opened, "out_head.weight", "tok_emb.weight")
    return opened


def _check_preset(source: str, preset: str, width: int, depth: int) -> None:
    """Raise a ValueError if the published size `preset` is not that of the tensors."""
    published = ScratchGPTConfig.from_preset(preset)
    if (published.hidden_size, published.num_hidden_layers) != (width, depth):
        raise ValueError(
            f"{source} has {depth} layers of width {width}, and {preset} has "
            f"{published.num_hidden_layers} of width {published.hidden_size}; pass --num-heads "
            "instead of --preset"
        )


def _heads(source: str, width: int, num_heads: int | None, preset: str | None) -> tuple[int, str]:
    """How many attention heads there are, and a note if that is an assumption."""
    if num_heads is not None:
        return num_heads, ""
    if preset is not None:
        return ScratchGPTConfig.from_preset(preset).num_attention_heads, ""
    known = {sizes["hidden_size"]: sizes["num_attention_heads"] for sizes in PRESETS.values()}
    if width not in known:
        raise ValueError(
            f"{source}: the tensors do not tell how many attention heads share the width {width}; "
            "pass --num-heads or --preset"
        )
    return known[width], f", {known[width]} heads assumed from the width {width}"
