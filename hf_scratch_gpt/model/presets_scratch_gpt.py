"""The published sizes. Nothing is imported that takes time, so that they can be shown at once."""

import difflib
from collections.abc import Mapping
from typing import Any

# `<|endoftext|>` in the vocabulary that OpenAI released. It begins, ends and pads a text.
END_OF_TEXT_ID = 50256

# GPT-2 (Radford et al. 2019, table 2, with the parameter counts that OpenAI published later).
# GPT-3 (Brown et al. 2020, table 2.1), with dense attention in every layer, where the paper
# alternates dense and banded ones. Two of its rows do not multiply out, and the head size of 128
# decides them: XL gives 24 heads for a width of 2048 (24 * 128 = 3072), here 16; 13B gives a width
# of 5140 for 40 heads (40 * 128 = 5120), here 5120.
_GPT3 = {"max_position_embeddings": 2048}
PRESETS: dict[str, dict[str, int]] = {
    "gpt2": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12),
    "gpt2-medium": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
    "gpt2-large": dict(hidden_size=1280, num_hidden_layers=36, num_attention_heads=20),
    "gpt2-xl": dict(hidden_size=1600, num_hidden_layers=48, num_attention_heads=25),
    "gpt3-small": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, **_GPT3),
    "gpt3-medium": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, **_GPT3),
    "gpt3-large": dict(hidden_size=1536, num_hidden_layers=24, num_attention_heads=16, **_GPT3),
    "gpt3-xl": dict(hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, **_GPT3),
    "gpt3-2.7b": dict(hidden_size=2560, num_hidden_layers=32, num_attention_heads=32, **_GPT3),
    "gpt3-6.7b": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, **_GPT3),
    "gpt3-13b": dict(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, **_GPT3),
    "gpt3-175b": dict(hidden_size=12288, num_hidden_layers=96, num_attention_heads=96, **_GPT3),
}

# Names by which people know the same sizes.
PRESET_ALIASES = {
    "124M": "gpt2",
    "355M": "gpt2-medium",
    "774M": "gpt2-large",
    "1558M": "gpt2-xl",
    "gpt2-small": "gpt2",
    "gpt3": "gpt3-175b",
}

# Activation names of transformers -> what `GELU` computes; other names are transformers' own.
GELU_FORMS = {
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu": "none",
    "gelu_python": "none",
}

# What all of them have.
_COMMON = dict(
    vocab_size=50257,
    max_position_embeddings=1024,
    hidden_act="gelu_new",
    qkv_bias=True,
    tie_word_embeddings=True,
    embedding_dropout=0.1,
    hidden_dropout=0.1,
    attention_dropout=0.1,
)


def find_preset(name: str) -> dict[str, Any]:
    """The fields of the published size called `name`, in `PRESETS` or `PRESET_ALIASES`.

    Raises:
        ValueError: no preset has that name; the error lists the nearest ones.
    """
    known = {key.lower(): key for key in (*PRESETS, *PRESET_ALIASES)}
    preset = known.get(name.lower())
    if preset is None:
        near = [known[key] for key in difflib.get_close_matches(name.lower(), known, 3, 0.5)]
        hint = f"did you mean {' or '.join(near)}?" if near else f"give {' or '.join(PRESETS)}"
        raise ValueError(f"no preset is called {name!r}; {hint}")
    return {**_COMMON, **PRESETS[PRESET_ALIASES.get(preset, preset)]}


def check_sizes(fields: Mapping[str, Any]) -> None:
    """Raise a ValueError that names a size outside its range, the limit and the remedy."""
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    for name in (*sizes, "intermediate_size", "max_position_embeddings"):
        if fields[name] is None or fields[name] < 1:
            raise ValueError(f"{name}={fields[name]} is below 1; give a positive number")
    if fields["hidden_size"] % fields["num_attention_heads"]:
        raise ValueError(
            f"hidden_size={fields['hidden_size']} does not divide into num_attention_heads="
            f"{fields['num_attention_heads']} heads of equal size; make one a multiple of the other"
        )
