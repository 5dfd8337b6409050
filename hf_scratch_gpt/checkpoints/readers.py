"""Open a GPT-2 of any format by its reader.

Each reader raises a ValueError that names the file if one is missing, damaged or of another kind,
and an OSError if there is no such file, folder or hub id.
"""

import re
from collections.abc import Callable
from inspect import signature
from itertools import islice
from os.path import lexists
from pathlib import Path

from .digests import unchecked_files
from .hf_gpt2 import read_hf_gpt2, weight_files
from .llmc import is_llmc, read_llmc
from .openai_release import read_openai_release
from .pickles import Pickle
from .sources import GPT2Source
from .state_dicts import read_nanogpt, read_weights
from .vocabularies import take_vocabulary

FORMATS: dict[str, Callable[..., GPT2Source]] = {
    "openai": read_openai_release,
    "hf": read_hf_gpt2,
    "nanogpt": read_nanogpt,
    "textbook": read_weights,
    "state_dict": read_weights,
    "llmc": read_llmc,
}
# The format of a folder by a file in it.
_MARKS = {"hparams.json": "openai", "config.json": "hf", "ckpt.pt": "nanogpt"}
_MARKS |= {"adapter_config.json": "hf"}
# Files that are parts of a GPT-2 in a folder.
_PARTS = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin|.*\.json"
    r"|checkpoint|model.*\.(index|meta|data-\d+-of-\d+)"
)


def recognize(source: str) -> str:
    """The format of `source`, one of `FORMATS`; a ValueError if it is none of them."""
    path = Path(source)
    if path.is_dir():
        for name, kind in _MARKS.items():
            if (path / name).is_file():
                return kind
        near = [child for child in islice(path.iterdir(), 1000) if child.suffix in (".pt", ".pth")]
        near += [mark.parent for name in _MARKS for mark in path.glob(f"*/{name}")]
        hint = f"; did you mean {' or '.join(map(str, near[:3]))}?" if near else ""
        raise ValueError(f"{source} is not a GPT-2: it has none of {', '.join(_MARKS)}{hint}")
    if not path.is_file():
        return "hf"
    if path.suffix == ".gguf":
        raise ValueError(
            f"{source} is a GGUF file; load it with GPT2LMHeadModel.from_pretrained(FOLDER, "
            "gguf_file=NAME), save it with save_pretrained, and convert that"
        )
    if path.suffix == ".safetensors":
        return "state_dict"
    if is_llmc(source):
        return "llmc"
    content = Pickle(source).content
    entries = content if isinstance(content, dict) else {}
    has_sizes = "model_args" in entries or "n_layer" in getattr(entries.get("config"), "fields", {})
    return "nanogpt" if has_sizes else "state_dict"


def _whole(source: str) -> str:
    """The folder of `source` if that is a part of the GPT-2 there."""
    path = Path(source)
    is_part = path.is_file() and _PARTS.fullmatch(path.name) is not None
    if is_part and path.suffix in (".safetensors", ".bin"):
        is_part = (path.parent / "config.json").is_file() and path in weight_files(path.parent)
    return str(path.parent) if is_part else source


def open_source(
    source: str, kind: str | None = None, tokenizer: str | None = None, **options: object
) -> GPT2Source:
    """Open the GPT-2 at `source`: a folder, a file or a hub id.

    Args:
        kind: one of `FORMATS`; recognised if not given.
        tokenizer: folder of the vocabulary, if `source` has none.
        options: for the format's reader, where they are not None.

    Raises:
        ValueError: as its reader, or its vocabulary is larger than its embedding.
    """
    path = Path(source)
    if not (path.is_file() or path.is_dir()) and (path.is_absolute() or lexists(path)):
        raise ValueError(f"{source} is missing, or is neither a file nor a folder")
    source = _whole(source)
    kind = kind or recognize(source)
    read = FORMATS[kind]
    given = {name: value for name, value in options.items() if value is not None}
    if unasked := given.keys() - signature(read).parameters.keys():
        names = ", ".join(f"--{name.replace('_', '-')}" for name in unasked)
        raise ValueError(f"{source} ({kind}) says itself what {names} would; leave it out")
    opened = read(source, **given)
    if kind != "openai":  # its checkpoints have checksums of their own
        files = {tensor.file for tensor in opened.tensors.values()}
        opened.unchecked = unchecked_files([Path(file) for file in sorted(files)], opened.digests)
    if tokenizer is not None:
        take_vocabulary(opened, tokenizer)
    if opened.tokenizer is not None and len(opened.tokenizer) > opened.config.vocab_size:
        theirs = f"the vocabulary has {len(opened.tokenizer)} tokens, and the model of {source}"
        raise ValueError(f"{theirs} {opened.config.vocab_size}; pass the tokenizer of its training")
    return opened
