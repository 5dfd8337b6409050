"""Read the state dict of a GPT written along with the from-scratch textbook: a `.pth` file.

Its blocks are called `trf_blocks.0`, with `att.W_query`, `att.W_key` and `att.W_value` apart, and
its LayerNorms have `scale` and `shift` (Raschka, Build a Large Language Model From Scratch, chapter
4).
"""

import re
from pathlib import Path

from hf_scratch_gpt import ScratchGPTConfig
from hf_scratch_gpt.configuration_scratch_gpt import PRESETS

from .digests import unchecked_files
from .sources import GPT2Source, load_pickle, stored_tensors, take_tied_head


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
    if not isinstance(content, dict):
        raise ValueError(f"{source} holds no state dict")
    tensors = stored_tensors(content, source)
    for name in ("tok_emb.weight", "pos_emb.weight"):
        if name not in tensors or len(tensors[name].shape) != 2:
            raise ValueError(f"{source} is no textbook GPT: it lacks a matrix {name}")
    vocabulary, width = tensors["tok_emb.weight"].shape
    layers = {
        int(match[1]) for name in tensors if (match := re.match(r"trf_blocks\.(\d+)\.", name))
    }
    inner = tensors.get("trf_blocks.0.ff.layers.0.weight")
    config = ScratchGPTConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=max(layers, default=0) + 1,
        num_attention_heads=_heads(source, width, num_heads, preset),
        intermediate_size=inner.shape[0] if inner else None,
        max_position_embeddings=tensors["pos_emb.weight"].shape[0],
        qkv_bias="trf_blocks.0.att.W_query.bias" in tensors,
    )
    dropped = {
        tensors.pop(name).name: "a causal mask, made anew for each text"
        for name in list(tensors)
        if name.endswith(".att.mask")
    }
    opened = GPT2Source(
        "textbook state dict",
        source,
        config,
        tensors,
        textbook=True,
        dropped=dropped,
        unchecked=unchecked_files([Path(source)]),
    )
    take_tied_head(opened, "out_head.weight", "tok_emb.weight")
    return opened


def _heads(source: str, width: int, num_heads: int | None, preset: str | None) -> int:
    if num_heads is not None:
        return num_heads
    if preset is not None:
        return ScratchGPTConfig.from_preset(preset).num_attention_heads
    known = {sizes["hidden_size"]: sizes["num_attention_heads"] for sizes in PRESETS.values()}
    if width not in known:
        raise ValueError(
            f"{source}: the tensors do not tell how many attention heads share the width {width}; "
            "pass --num-heads or --preset"
        )
    return known[width]
