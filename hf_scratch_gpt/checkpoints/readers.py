"""Open a GPT-2 of any format by its reader.

Each reader raises a ValueError that names the file if one is missing, damaged or of another kind,
and an OSError if there is no such file, folder or hub id.
"""

from collections.abc import Callable
from os.path import lexists
from pathlib import Path

from ..model.tokenization_scratch_gpt import ScratchGPTTokenizer
from .digests import unchecked_files
from .hf_gpt2 import read_hf_gpt2
from .llmc import is_llmc, read_llmc
from .openai_release import read_openai_release
from .pickles import Pickle
from .sources import GPT2Source
from .state_dicts import read_nanogpt, read_textbook

FORMATS: dict[str, Callable[..., GPT2Source]] = {
    "openai": read_openai_release,
    "hf": read_hf_gpt2,
    "nanogpt": read_nanogpt,
    "textbook": read_textbook,
    "llmc": read_llmc,
}
# The format of a folder by a file in it.
_MARKS = {"hparams.json": "openai", "config.json": "hf", "ckpt.pt": "nanogpt"}


def recognize(source: str) -> str:
    """The format of `source`, one of `FORMATS`; a ValueError if it is none of them."""
    path = Path(source)
    if path.is_dir():
        for name, kind in _MARKS.items():
            if (path / name).is_file():
                return kind
        raise ValueError(f"{source} is not a GPT-2: it has none of {', '.join(_MARKS)}")
    if not path.is_file():
        return "hf"
    if is_llmc(source):
        return "llmc"
    content = Pickle(source).content
    return "nanogpt" if isinstance(content, dict) and "model_args" in content else "textbook"


def open_source(
    source: str, kind: str | None = None, tokenizer: str | None = None, **options: object
) -> GPT2Source:
    """Open the GPT-2 at `source`: a folder, a file or a hub id.

    Args:
        kind: one of `FORMATS`; recognised if not given.
        tokenizer: folder of the vocabulary, if `source` has none.
        options: for `read_textbook`.

    Raises:
        ValueError: as its reader, or its vocabulary is larger than its embedding.
    """
    path = Path(source)
    if not (path.is_file() or path.is_dir()) and (path.is_absolute() or lexists(path)):
        raise ValueError(f"{source} is missing, or is neither a file nor a folder")
    kind = kind or recognize(source)
    opened = FORMATS[kind](source, **(options if kind == "textbook" else {}))
    if kind != "openai":  # its checkpoints have checksums of their own
        files = {tensor.file for tensor in opened.tensors.values()}
        opened.unchecked = unchecked_files([Path(file) for file in sorted(files)])
    if tokenizer is not None:
        opened.adopt(ScratchGPTTokenizer.from_pretrained(tokenizer))
    if opened.tokenizer is not None and len(opened.tokenizer) > opened.config.vocab_size:
        theirs = f"the vocabulary has {len(opened.tokenizer)} tokens, and the model of {source}"
        raise ValueError(f"{theirs} {opened.config.vocab_size}; pass the tokenizer of its training")
    return opened
