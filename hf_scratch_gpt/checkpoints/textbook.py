"""Read the state dict of a GPT written along with the from-scratch textbook: a `.pth` file.

Its blocks are called `trf_blocks.0`, with `att.W_query`, `att.W_key` and `att.W_value` apart, and
its LayerNorms have `scale` and `shift` (Raschka, Build a Large Language Model From Scratch, chapter
4).
"""

import re
from dataclasses import replace

import torch

from ..model.configuration_scratch_gpt import PRESETS, ScratchGPTConfig
from .names import rules_of
from .pickles import Pickle
from .sources import GPT2Source, StoredTensor, by_plain_name, told_as_error


def read_textbook(
    source: str, num_heads: int | None = None, preset: str | None = None
) -> GPT2Source:
    """Open the file `source`.

    Its tensors do not tell the number of heads: give `num_heads`, or a published size, `preset`.
    """
    pickle = Pickle(source)
    is_wrapped = isinstance(pickle.content, dict) and "model_state_dict" in pickle.content
    tensors, dropped = by_plain_name(pickle.tensors("model_state_dict" if is_wrapped else None))
    for name in ("tok_emb.weight", "pos_emb.weight"):
        if name not in tensors or len(tensors[name].shape) != 2:
            raise ValueError(f"{source} is not a textbook GPT: it lacks a matrix {name}")
    vocabulary, width = tensors["tok_emb.weight"].shape
    layers = [re.match(r"trf_blocks\.(\d+)\.", name) for name in tensors]
    depth = max((int(layer[1]) for layer in layers if layer), default=0) + 1
    inner = tensors.get("trf_blocks.0.ff.layers.0.weight")
    heads, assumed = _heads(source, width, depth, num_heads, preset)
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
    named = _by_gpt2_name(tensors, depth)
    opened = GPT2Source(f"textbook state dict{assumed}", source, config, named, dropped)
    opened.untie_or_drop_head()
    return opened


def _by_gpt2_name(tensors: dict[str, StoredTensor], depth: int) -> dict[str, StoredTensor]:
    """`tensors` by transformers' names where they have one; query, key and value are joined."""
    left, named = dict(tensors), {}
    for rule in rules_of(min(depth, len(tensors))):
        if all(name in left for name in rule.textbook):
            named[rule.gpt2] = _joined([left.pop(name) for name in rule.textbook])
    return named | left


def _joined(parts: list[StoredTensor]) -> StoredTensor:
    """One tensor of equal `parts` along the outputs."""
    if len(parts) == 1:
        return parts[0]
    for part in parts:
        part.check(parts[0].shape)
    return replace(
        parts[0],
        name=" and ".join(part.name for part in parts),
        shape=(sum(part.shape[0] for part in parts if part.shape), *parts[0].shape[1:]),
        read=lambda: torch.cat([part.read() for part in parts]),
    )


def _heads(
    source: str, width: int, depth: int, num_heads: int | None, preset: str | None
) -> tuple[int, str]:
    """How many attention heads there are, and a note if that is an assumption."""
    if preset is not None:
        published = ScratchGPTConfig.from_preset(preset)
        if (published.hidden_size, published.num_hidden_layers) != (width, depth):
            raise ValueError(
                f"{source} has {depth} layers of width {width}, and {preset} has "
                f"{published.num_hidden_layers} of width {published.hidden_size}; pass --num-heads "
                "instead of --preset"
            )
        return num_heads or published.num_attention_heads, ""
    if num_heads is not None:
        return num_heads, ""
    known = {sizes["hidden_size"]: sizes["num_attention_heads"] for sizes in PRESETS.values()}
    if width not in known:
        raise ValueError(
            f"{source}: the tensors do not tell how many attention heads share the width {width}; "
            "pass --num-heads or --preset"
        )
    return known[width], f", {known[width]} heads assumed from the width {width}"
