"""Read a folder of OpenAI's GPT-2 release.

It holds `checkpoint`, `hparams.json`, `encoder.json`, `vocab.bpe` and a TensorFlow checkpoint with
one variable a weight, `model/h0/attn/c_attn/w` and so on (github.com/openai/gpt-2, src/model.py).
"""

import json
import re
from pathlib import Path

import torch

from hf_scratch_gpt import ScratchGPTConfig, ScratchGPTTokenizer
from hf_scratch_gpt.vocabulary_scratch_gpt import END_OF_TEXT

from .sources import GPT2Source
from .tensor_bundle import TensorBundle


def is_openai_release(source: str) -> bool:
    """Whether `source` is a folder of OpenAI's release."""
    return (Path(source) / "hparams.json").is_file()


def read_openai_release(source: str) -> GPT2Source:
    """Open the release in the folder `source`.

    Raises:
        ValueError: a file is missing or damaged, or the files disagree; names it.
    """
    folder = Path(source)
    for name in ("hparams.json", "encoder.json", "vocab.bpe", "checkpoint"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing; an OpenAI release has it")
    tokenizer = ScratchGPTTokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    hparams = json.loads((folder / "hparams.json").read_text(encoding="utf-8"))
    end_of_text = tokenizer.get_vocab()[END_OF_TEXT]
    config = ScratchGPTConfig(
        **hparams, bos_token_id=end_of_text, eos_token_id=end_of_text, pad_token_id=end_of_text
    )
    tokenizer.model_max_length = config.max_position_embeddings

    bundle = TensorBundle(folder / _checkpoint_name(folder / "checkpoint"))
    tensors = {_hf_name(name): _hf_tensor(name, bundle.tensor(name)) for name in bundle.shapes}
    return GPT2Source(
        origin="OpenAI release",
        load_arguments={
            "pretrained_model_name_or_path": None,
            "config": config,
            "state_dict": tensors,
        },
        tokenizer=tokenizer,
    )


def _checkpoint_name(path: Path) -> str:
    """The checkpoint that the text file `path` names; always a file beside it."""
    match = re.search(
        r'^model_checkpoint_path: "([^"/\\]+)"$', path.read_text(encoding="utf-8"), re.MULTILINE
    )
    if match is None or match[1] in (".", ".."):
        raise ValueError(
            f"{path} names no checkpoint beside it; its first line should be "
            'model_checkpoint_path: "model.ckpt"'
        )
    return match[1]


def _hf_name(name: str) -> str:
    """transformers' name of OpenAI's variable: model/h0/ln_1/g is h.0.ln_1.weight."""
    match = re.fullmatch(r"model/(?:h(\d+)/)?(.+)", name)
    if match is None:
        raise ValueError(f"{name} is no variable of GPT-2; their names begin with model/")
    leaves = {"w": "weight", "g": "weight", "b": "bias"}
    *modules, leaf = match[2].split("/")
    parts = [*modules, leaves[leaf]] if leaf in leaves else [*modules, leaf, "weight"]
    return ".".join(parts if match[1] is None else ["h", match[1], *parts])


def _hf_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in transformers' shape; OpenAI's matrices are convolutions, (1, in, out)."""
    return tensor.squeeze(0) if name.endswith("/w") else tensor
