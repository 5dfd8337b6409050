"""Read a folder of OpenAI's GPT-2 release.

It holds `checkpoint`, `hparams.json`, `encoder.json`, `vocab.bpe` and a TensorFlow checkpoint with
one variable a weight, `model/h0/attn/c_attn/w` and so on (github.com/openai/gpt-2, src/model.py).
"""

import re
from functools import partial
from pathlib import Path

import torch

from ..model.configuration_scratch_gpt import ScratchGPTConfig
from ..model.tokenization_scratch_gpt import ScratchGPTTokenizer
from ..model.vocabulary_scratch_gpt import END_OF_TEXT, read_json, read_text
from .sources import GPT2Source, StoredTensor, told_as_error
from .tensor_bundle import TensorBundle

_SIZES = {"n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"}


def read_openai_release(source: str) -> GPT2Source:
    """Open the release in the folder `source`.

    Raises:
        ValueError: a file is missing or damaged, or the files disagree; names it.
    """
    folder = Path(source)
    for name in ("hparams.json", "encoder.json", "vocab.bpe", "checkpoint"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing; an OpenAI release has it")
    hparams_path = folder / "hparams.json"
    with told_as_error(hparams_path):
        hparams = read_json(read_text(hparams_path), str(hparams_path))
    if hparams.keys() != _SIZES or not all(type(size) is int for size in hparams.values()):
        raise ValueError(
            f"{hparams_path} should give whole numbers for {', '.join(sorted(_SIZES))}"
        )
    bundle = TensorBundle(folder / _checkpoint_name(folder / "checkpoint"))
    for name, size in (("model/wte", "n_vocab"), ("model/wpe", "n_ctx")):
        shape = bundle.shapes.get(name, ())
        if shape != (hparams[size], hparams["n_embd"]):
            raise ValueError(
                f"{bundle.index_path}: {name} has shape {list(shape)}, and {hparams_path} says "
                f"{size} {hparams[size]} and n_embd {hparams['n_embd']}"
            )
    with told_as_error(folder):
        tokenizer = ScratchGPTTokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    if len(tokenizer) != hparams["n_vocab"]:
        raise ValueError(
            f"{folder / 'encoder.json'} has {len(tokenizer)} tokens, and {hparams_path} says "
            f"n_vocab {hparams['n_vocab']}"
        )
    end_of_text = tokenizer.get_vocab()[END_OF_TEXT]
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_of_text)
    with told_as_error(hparams_path):
        config = ScratchGPTConfig(**hparams, **tokens)

    tensors: dict[str, StoredTensor] = {}
    for name, shape in bundle.shapes.items():
        # Its matrices are convolutions of width 1, (1, inputs, outputs).
        is_matrix = name.endswith("/w") and shape[:1] == (1,)
        hf_name = _hf_name(name, bundle.index_path)
        if hf_name in tensors:
            raise ValueError(
                f"{bundle.index_path}: {tensors[hf_name].name} and {name} are both {hf_name}"
            )
        tensors[hf_name] = StoredTensor(
            name,
            str(folder),
            shape[1:] if is_matrix else shape,
            bundle.dtype(name),
            partial(_read, bundle, name, is_matrix),
        )
    opened = GPT2Source(
        "OpenAI release", source, config, tensors, inputs_first=True, own_name=_both_names
    )
    opened.adopt(tokenizer)
    return opened


def _read(bundle: TensorBundle, name: str, is_matrix: bool) -> torch.Tensor:
    tensor = bundle.tensor(name)
    return tensor.squeeze(0) if is_matrix else tensor


def _checkpoint_name(path: Path) -> str:
    """The checkpoint that the text file `path` names; always a file beside it."""
    match = re.search(r'^model_checkpoint_path: "([^"/\\]+)"$', read_text(path), re.MULTILINE)
    if match is None or match[1] in (".", ".."):
        raise ValueError(
            f"{path} names no checkpoint beside it; its first line should be "
            'model_checkpoint_path: "model.ckpt"'
        )
    return match[1]


def _hf_name(name: str, index_path: Path) -> str:
    """transformers' name of OpenAI's variable: model/h0/ln_1/g is h.0.ln_1.weight."""
    match = re.fullmatch(r"model/(?:h(\d+)/)?(.+)", name)
    if match is None:
        raise ValueError(f"{index_path}: {name!r} is no variable of GPT-2")
    leaves = {"w": "weight", "g": "weight", "b": "bias"}
    *modules, leaf = match[2].split("/")
    parts = [*modules, leaves[leaf]] if leaf in leaves else [*modules, leaf, "weight"]
    return ".".join(parts if match[1] is None else ["h", match[1], *parts])


def _both_names(hf_name: str) -> str:
    """transformers' name and OpenAI's: h.0.ln_1.weight (model/h0/ln_1/g)."""
    *modules, leaf = re.sub(r"^h\.", "h", hf_name).split(".")
    if modules[-1] in ("wte", "wpe"):
        return f"{hf_name} (model/{modules[-1]})"
    openai_leaf = "b" if leaf == "bias" else "g" if modules[-1].startswith("ln_") else "w"
    return f"{hf_name} ({'/'.join(['model', *modules, openai_leaf])})"
