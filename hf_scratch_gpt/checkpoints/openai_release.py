"""Read a folder of OpenAI's GPT-2 release.

It holds `checkpoint`, `hparams.json`, `encoder.json`, `vocab.bpe` and a TensorFlow checkpoint with
one variable a weight, `model/h0/attn/c_attn/w` and so on (github.com/openai/gpt-2, src/model.py).
"""

import re
from pathlib import Path

from transformers import GPT2Config

from ..model.configuration_scratch_gpt import ScratchGPTConfig
from ..model.tokenization_scratch_gpt import ScratchGPTTokenizer
from ..model.vocabulary_scratch_gpt import END_OF_TEXT, read_json, read_text
from .names import rules_of
from .sources import TOKENS, GPT2Source, gpt2, told_as_error
from .tensor_bundle import read_bundle

_SIZES = {"n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"}


def read_openai_release(source: str) -> GPT2Source:
    """Open the release in the folder `source`."""
    folder = Path(source)
    for name in ("hparams.json", "encoder.json", "vocab.bpe", "checkpoint"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing; an OpenAI release has it")
    with told_as_error(folder):
        tokenizer = ScratchGPTTokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    config, theirs = _config(folder / "hparams.json", tokenizer)
    checkpoint = _checkpoint_name(folder / "checkpoint")
    stored = {tensor.name: tensor for tensor in read_bundle(folder / checkpoint)}
    tensors = {}
    for rule in rules_of(min(config.num_hidden_layers, len(stored))):
        if (tensor := stored.pop(_openai_name(rule.gpt2), None)) is not None:
            if rule.is_matrix and tensor.shape[:1] == (1,):  # a convolution of width 1
                tensor = tensor.made(lambda kernel: kernel[0], tensor.shape[1:])
            tensors[rule.gpt2] = tensor
    tensors |= stored
    opened = GPT2Source("OpenAI release", source, config, theirs, tensors, inputs_first=True)
    opened.adopt(tokenizer)
    return opened


def _config(path: Path, tokenizer: ScratchGPTTokenizer) -> tuple[ScratchGPTConfig, GPT2Config]:
    """What `hparams.json` describes, as a configuration of ours and of transformers'."""
    with told_as_error(path):
        hparams = read_json(read_text(path), str(path))
        if hparams.keys() != _SIZES or not all(type(size) is int for size in hparams.values()):
            raise ValueError(f"{path} should give whole numbers for {', '.join(sorted(_SIZES))}")
        if len(tokenizer) != hparams["n_vocab"]:
            theirs = f"{path.with_name('encoder.json')} has {len(tokenizer)} tokens"
            raise ValueError(f"{theirs}, and {path} says n_vocab {hparams['n_vocab']}")
        tokens = dict.fromkeys(TOKENS, tokenizer.get_vocab()[END_OF_TEXT])
        config = ScratchGPTConfig(**hparams, **tokens)
        sizes = dict(vocab_size=hparams.pop("n_vocab"), n_positions=hparams.pop("n_ctx"))
        # The tanh form: gelu in src/model.py.
        return config, gpt2(**sizes, **hparams, activation_function="gelu_new")


def _openai_name(gpt2: str) -> str:
    """OpenAI's name of transformers' tensor `gpt2`: h.0.ln_1.weight is model/h0/ln_1/g."""
    *modules, leaf = re.sub(r"^h\.", "h", gpt2).split(".")
    if modules[-1] not in ("wte", "wpe"):
        modules.append("b" if leaf == "bias" else "g" if modules[-1].startswith("ln_") else "w")
    return "/".join(["model", *modules])


def _checkpoint_name(path: Path) -> str:
    """The checkpoint that the text file `path` names; always a file beside it."""
    match = re.search(r'^model_checkpoint_path: "([^"/\\]+)"$', read_text(path), re.MULTILINE)
    if match is None or match[1] in (".", ".."):
        line = 'model_checkpoint_path: "model.ckpt"'
        raise ValueError(f"{path} names no checkpoint beside it; its first line should be {line}")
    return match[1]
