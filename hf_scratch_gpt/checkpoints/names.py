"""The one table between the tensor names and layouts of GPT-2 checkpoints and ours.

`from_pretrained` applies it to every GPT-2 checkpoint in transformers' format while loading. The
conversion applies it to every other format, and backwards for export. A rule that matches nothing
does nothing, so our own checkpoints load untouched.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, Transpose, WeightConverter, WeightRenaming

# Causal masks, buffers of older models: transformers' and nanoGPT's, the textbook's.
CAUSAL_MASK = re.compile(r".*\.(attn\.bias|attn\.masked_bias|att\.mask)")


@dataclass(frozen=True)
class Rule:
    """One tensor of GPT-2 and its names elsewhere; `{}` stands for the number of the layer.

    Args:
        gpt2: transformers' name in a base model.
        ours: our names in a base model; several are equal parts along the outputs, in this order.
        textbook: the names of the from-scratch textbook, one for each of ours.
        is_matrix: whether it is the weight of a linear layer. transformers' GPT-2 and OpenAI's
            hold it as (inputs, outputs), all others as (outputs, inputs).
    """

    gpt2: str
    ours: tuple[str, ...]
    textbook: tuple[str, ...]
    is_matrix: bool = False


def _norm(gpt2: str, ours: str, textbook: str) -> list[Rule]:
    return [
        Rule(f"{gpt2}.weight", (f"{ours}.weight",), (f"{textbook}.scale",)),
        Rule(f"{gpt2}.bias", (f"{ours}.bias",), (f"{textbook}.shift",)),
    ]


def _linear(gpt2: str, ours: tuple[str, ...], textbook: tuple[str, ...]) -> list[Rule]:
    return [
        Rule(
            f"h.{{}}.{gpt2}.{kind}",
            tuple(f"layers.{{}}.{name}.{kind}" for name in ours),
            tuple(f"trf_blocks.{{}}.{name}.{kind}" for name in textbook),
            is_matrix=kind == "weight",
        )
        for kind in ("weight", "bias")
    ]


_QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
_TEXTBOOK_QKV = ("att.W_query", "att.W_key", "att.W_value")
# The order is that of llm.c's files, which have no names.
TABLE: list[Rule] = [
    Rule("wte.weight", ("embed_tokens.weight",), ("tok_emb.weight",)),
    Rule("wpe.weight", ("embed_positions.weight",), ("pos_emb.weight",)),
    *_norm("h.{}.ln_1", "layers.{}.input_layernorm", "trf_blocks.{}.norm1"),
    *_linear("attn.c_attn", _QKV, _TEXTBOOK_QKV),
    *_linear("attn.c_proj", ("self_attn.o_proj",), ("att.out_proj",)),
    *_norm("h.{}.ln_2", "layers.{}.post_attention_layernorm", "trf_blocks.{}.norm2"),
    *_linear("mlp.c_fc", ("mlp.up_proj",), ("ff.layers.0",)),
    *_linear("mlp.c_proj", ("mlp.down_proj",), ("ff.layers.2",)),
    *_norm("ln_f", "norm", "final_norm"),
]


def rules_of(num_layers: int) -> Iterator[Rule]:
    """The rules of a language model, written out for each layer; that of its head is the last."""
    for rule in TABLE:
        for layer in range(num_layers if "{}" in rule.gpt2 else 1):
            ours = tuple(f"model.{name.format(layer)}" for name in rule.ours)
            textbook = tuple(name.format(layer) for name in rule.textbook)
            yield Rule(rule.gpt2.format(layer), ours, textbook, rule.is_matrix)
    yield Rule("lm_head.weight", ("lm_head.weight",), ("out_head.weight",))


class _Parts(Chunk):
    """Equal parts of a tensor, as copies: tools that write storages would write it with each."""

    def convert(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return {name: part.clone() for name, part in super().convert(*args, **kwargs).items()}


def _loading_rules(rule: Rule) -> WeightRenaming | WeightConverter:
    """`rule` as transformers applies it while loading, after `h.` has become `layers.`."""
    if "{}" not in rule.gpt2:
        return WeightRenaming(rf"^(?:transformer\.)?{rule.gpt2}", rule.ours[0])
    source = rule.gpt2.removeprefix("h.{}.")
    targets = [name.removeprefix("layers.{}.") for name in rule.ours]
    if not rule.is_matrix and len(targets) == 1:
        return WeightRenaming(rf"\.{source}", f".{targets[0]}")
    operations = [Transpose(0, 1)] if rule.is_matrix else []
    if len(targets) > 1:
        operations.append(_Parts(dim=0))
    return WeightConverter([source], targets, operations=operations)


# Both layouts occur: `transformer.h.0...` of a language model and `h.0...` of a base model.
BASE_MODEL_RULES = [
    WeightRenaming(r"^(?:transformer\.)?h\.", "layers."),
    *map(_loading_rules, TABLE),
]


def register_gpt2_rules() -> None:
    """Let `from_pretrained` of every model here read GPT-2 checkpoints."""
    # By class name, since the heads share one model type and one of them has a rule of its own.
    register_checkpoint_conversion_mapping("ScratchGPTModel", BASE_MODEL_RULES, overwrite=True)
    head = [WeightRenaming(r"^classifier\.", "score.")]
    register_checkpoint_conversion_mapping("ScratchGPTForTokenClassification", head, overwrite=True)
