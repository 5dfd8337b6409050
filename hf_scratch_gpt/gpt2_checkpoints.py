"""The one table of rules between the names and layouts of GPT-2 checkpoints and ours.

`from_pretrained` applies it to every GPT-2 checkpoint in transformers' format, and conversion to
OpenAI's release, once its tensors go by transformers' names. A rule that matches nothing does
nothing, so our own checkpoints load untouched.
"""

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, Transpose, WeightConverter, WeightRenaming


def _rename(source: str, target: str) -> WeightRenaming:
    return WeightRenaming(source_patterns=source, target_patterns=target)


def _transpose(source: str, *targets: str) -> WeightConverter:
    """GPT-2 multiplies by (inputs, outputs) matrices; nn.Linear holds (outputs, inputs)."""
    split = [Chunk(dim=0)] if len(targets) > 1 else []
    return WeightConverter([source], list(targets), operations=[Transpose(0, 1), *split])


# Renamings come first, all that match; then at most one conversion, by the end of the renamed name.
# Both layouts occur: `transformer.h.0...` of a language model and `h.0...` of a base model.
BASE_MODEL_RULES = [
    _rename(r"^(?:transformer\.)?wte\.", "embed_tokens."),
    _rename(r"^(?:transformer\.)?wpe\.", "embed_positions."),
    _rename(r"^(?:transformer\.)?ln_f\.", "norm."),
    _rename(r"^(?:transformer\.)?h\.", "layers."),
    _rename(r"\.ln_1\.", ".input_layernorm."),
    _rename(r"\.ln_2\.", ".post_attention_layernorm."),
    _rename(r"\.attn\.", ".self_attn."),
    _rename(r"self_attn\.c_proj\.bias", "self_attn.o_proj.bias"),
    _rename(r"mlp\.c_fc\.bias", "mlp.up_proj.bias"),
    _rename(r"mlp\.c_proj\.bias", "mlp.down_proj.bias"),
    _transpose("self_attn.c_attn.weight", *(f"self_attn.{name}_proj.weight" for name in "qkv")),
    WeightConverter(
        ["self_attn.c_attn.bias"],
        [f"self_attn.{name}_proj.bias" for name in "qkv"],
        operations=[Chunk(dim=0)],
    ),
    _transpose("self_attn.c_proj.weight", "self_attn.o_proj.weight"),
    _transpose("mlp.c_fc.weight", "mlp.up_proj.weight"),
    _transpose("mlp.c_proj.weight", "mlp.down_proj.weight"),
]
TOKEN_CLASSIFICATION_RULES = [_rename(r"^classifier\.", "score.")]


def register_gpt2_rules() -> None:
    """Let `from_pretrained` of every model here read GPT-2 checkpoints."""
    # By class name: while a GPT-2 checkpoint loads, transformers still looks up its model type,
    # "gpt2".
    register_checkpoint_conversion_mapping("ScratchGPTModel", BASE_MODEL_RULES, overwrite=True)
    register_checkpoint_conversion_mapping(
        "ScratchGPTForTokenClassification", TOKEN_CLASSIFICATION_RULES, overwrite=True
    )
