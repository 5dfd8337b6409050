"""Read a GPT's state dict that torch.save wrote: of nanoGPT and its kin, or of the textbook.

nanoGPT's `ckpt.pt` holds the sizes beside the weights (github.com/karpathy/nanoGPT, train.py), and
so does `model_05000.pt` of build-nanoGPT (github.com/karpathy/build-nanogpt, train_gpt2.py). A file
of weights alone, of minGPT or of the from-scratch textbook (Raschka, Build a Large Language Model
From Scratch, chapter 4), tells all sizes but the number of heads.
"""

import re
from math import prod
from pathlib import Path
from typing import Any

from ..model.configuration_scratch_gpt import ScratchGPTConfig
from ..model.presets_scratch_gpt import PRESETS
from .hf_gpt2 import safetensors
from .names import rules_of
from .pickles import Pickle
from .sources import WRAPPERS, GPT2Source, StoredTensor, by_plain_name, gpt2, joined, told_as_error
from .vocabularies import read_characters

# nanoGPT rounds GPT-2's vocabulary up to a multiple of 64; no text has the ids above.
_PADDED, _VOCABULARY = 50304, 50257
# Forms of GELU, as a user names them.
ACTIVATIONS = {"tanh": "gelu_new", "exact": "gelu", "gelu_new": "gelu_new", "gelu": "gelu"}
# Where files of weights alone keep them, beside an optimizer's state and the like.
_KEYS = ("model_state_dict", "state_dict", "model")


def read_nanogpt(source: str, activation: str | None = None) -> GPT2Source:
    """Open the checkpoint of nanoGPT or build-nanoGPT at `source`, the file or its folder.

    Args:
        activation: the form of GELU, one of `ACTIVATIONS`; by the file's age if not given.
    """
    path = str(Path(source) / "ckpt.pt") if Path(source).is_dir() else source
    pickle = Pickle(path)
    content = pickle.content if isinstance(pickle.content, dict) else {}
    arguments = content.get("model_args") or getattr(content.get("config"), "fields", None)
    if "model" not in content or not isinstance(arguments, dict):
        raise ValueError(f"{path} is not a nanoGPT checkpoint: it lacks model or model_args")
    origin = "nanoGPT" if "model_args" in content else "build-nanoGPT"
    form, reason = _nanogpts_form(origin, arguments)
    form = activation or form
    names = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")
    with told_as_error(f"{path}: model_args"):
        if missing := [name for name in names if name not in arguments]:
            raise ValueError(f"lacks {', '.join(missing)}")
        fields = {name.replace("block_size", "n_positions"): arguments[name] for name in names}
        bias, dropout = bool(arguments.get("bias", True)), float(arguments.get("dropout") or 0.0)
        config = ScratchGPTConfig(**fields, drop_rate=dropout, qkv_bias=bias)
        config.hidden_act = ACTIVATIONS[form]
        theirs = gpt2(**fields, activation_function=ACTIVATIONS[form])
    named = by_plain_name(pickle.tensors("model"), (*WRAPPERS, "transformer."))
    opened = GPT2Source(origin, path, config, theirs, *named, biases_optional=not bias)
    opened.notes.append(_told(form, reason, activation))
    _take_characters(opened, Path(path).with_name("meta.pkl"))
    return _settled(opened)


def _nanogpts_form(origin: str, arguments: dict[str, Any]) -> tuple[str, str]:
    """The form of GELU, and why it is that."""
    if origin == "build-nanoGPT":
        return "tanh", "as build-nanoGPT computes it"
    if "bias" not in arguments:
        return "tanh", "as nanoGPT computed it until January 2023, without the field `bias` yet"
    older = "if this file is from before, which had the tanh form, pass --activation tanh"
    return "exact", f"as nanoGPT computes it since May 2023; {older}"


def _told(form: str, reason: str, chosen: str | None) -> str:
    """A line of the report that says which form of GELU was taken and why."""
    name = "exact" if ACTIVATIONS[form] == "gelu" else "tanh"
    return f"took     the {name} form of GELU, {'as --activation says' if chosen else reason}"


def _take_characters(source: GPT2Source, path: Path) -> None:
    """Take the characters in `path` for tokens, if it is there and fits."""
    if not path.is_file():
        return
    tokenizer = read_characters(path)
    if len(tokenizer) == source.config.vocab_size:
        source.adopt(tokenizer)
    else:
        sizes = f"{len(tokenizer)} characters, and the model {source.config.vocab_size} tokens"
        source.notes.append(f"left out {path}: it has {sizes}")


def _settled(source: GPT2Source) -> GPT2Source:
    """`source` with its output head tied or not, and without the padding of its vocabulary."""
    source.untie_or_drop_head()
    if source.config.vocab_size == _PADDED:
        source.trim_vocabulary(_VOCABULARY)
    return source


def read_weights(
    source: str,
    num_heads: int | None = None,
    preset: str | None = None,
    activation: str | None = None,
) -> GPT2Source:
    """Open the file `source` of weights alone, by the textbook's names or transformers' of GPT-2.

    Args:
        num_heads: attention heads, if no published size has the width.
        preset: a published size that it has.
        activation: the form of GELU, one of `ACTIVATIONS`; the tanh form if not given.
    """
    left, dropped = by_plain_name(_weights_in(source), (*WRAPPERS, "transformer.", "model."))
    tensors: dict[str, StoredTensor] = {}
    for rule in rules_of(_depth(left, "trf_blocks")):
        if all(name in left for name in rule.textbook):
            tensors[rule.gpt2] = joined([left.pop(name) for name in rule.textbook])
    origin = "textbook state dict" if tensors else "GPT-2 state dict"
    tensors |= left
    sizes = _sizes(source, tensors, num_heads, preset)
    attention = tensors.get("h.0.attn.c_attn.weight")
    form = activation or "tanh"
    with told_as_error(source):
        bias = "h.0.attn.c_attn.bias" in tensors
        config = ScratchGPTConfig(**sizes, qkv_bias=bias, hidden_act=ACTIVATIONS[form])
        theirs = gpt2(**sizes, activation_function=ACTIVATIONS[form])
    opened = GPT2Source(origin, source, config, theirs, tensors, dropped)
    opened.inputs_first = attention is not None and attention.shape[1:] == (3 * sizes["n_embd"],)
    opened.biases_optional = "h.0.mlp.c_fc.bias" not in tensors
    usual = "as in GPT-2, minGPT and the textbook; for nanoGPT since May 2023, --activation exact"
    opened.notes.append(_told(form, usual, activation))
    if num_heads is None and preset is None:
        heads, width = sizes["n_head"], sizes["n_embd"]
        opened.origin += f", {heads} heads assumed from the width {width}"
    return _settled(opened)


def _weights_in(source: str) -> list[StoredTensor]:
    """The tensors of the state dict that `source` is, or has beside other things."""
    if source.endswith(".safetensors"):
        return safetensors(Path(source))
    pickle = Pickle(source)
    entries = pickle.content if isinstance(pickle.content, dict) else {}
    if "model_args" in entries:
        raise ValueError(
            f"{source} is a checkpoint of nanoGPT, which says more; leave --format out"
        )
    keys = (key for key in _KEYS if isinstance(entries.get(key), dict))
    return pickle.tensors(next(keys, None))


def _depth(tensors: dict[str, StoredTensor], block: str) -> int:
    """How many blocks there are; not more than tensors, since a name may say anything."""
    numbers = [re.match(rf"{block}\.(\d{{1,9}})\.", name) for name in tensors]
    return min(max((int(n[1]) for n in numbers if n), default=0) + 1, len(tensors))


def _sizes(
    source: str, tensors: dict[str, StoredTensor], num_heads: int | None, preset: str | None
) -> dict[str, int]:
    """The sizes of a GPT-2 with these `tensors`, by transformers' names."""
    tokens = tensors.get("wte.weight") or tensors.get("lm_head.weight")
    positions, inner = tensors.get("wpe.weight"), tensors.get("h.0.mlp.c_fc.weight")
    if tokens is None or positions is None or {len(tokens.shape), len(positions.shape)} != {2}:
        raise ValueError(
            f"{source} is neither a GPT-2 nor a textbook GPT: it lacks a matrix wte.weight or "
            f"wpe.weight, or tok_emb.weight or pos_emb.weight; it has {', '.join([*tensors][:5])}"
        )
    vocabulary, width = tokens.shape
    depth = _depth(tensors, "h")
    heads = _heads(source, width, depth, num_heads, preset)
    sizes = dict(vocab_size=vocabulary, n_embd=width, n_layer=depth, n_head=heads)
    sizes["n_positions"] = positions.shape[0]
    if inner is not None and len(inner.shape) == 2:
        sizes["n_inner"] = prod(inner.shape) // width
    return sizes


def _heads(source: str, width: int, depth: int, num_heads: int | None, preset: str | None) -> int:
    """How many attention heads there are."""
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
        return known[width] if num_heads is None else num_heads
    if width not in known:
        raise ValueError(
            f"{source}: the tensors do not tell how many attention heads share the width {width}; "
            "pass --num-heads or --preset"
        )
    return known[width]
