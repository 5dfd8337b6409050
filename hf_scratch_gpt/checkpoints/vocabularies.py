"""The vocabulary that lies beside a checkpoint.

One of GPT-2's kind becomes our tokenizer, and nanoGPT's table of characters one of transformers'.
Files of another kind, such as BertTokenizer's, are copied as they are, for transformers to read.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from ..characters import character_tokenizer
from ..model.tokenization_scratch_gpt import ScratchGPTTokenizer
from ..model.vocabulary_scratch_gpt import read_json, read_text
from .pickles import plain_content
from .sources import GPT2Source, told_as_error

# Names of classes that read GPT-2's kind of vocabulary.
_GPT2S = {None, "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast"}
_GPT2S |= {"TokenizersBackend", "ScratchGPTTokenizer"}
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_VOCABULARIES = ["tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"]
_VOCABULARIES += ["*.model", "*.spm", "*.tiktoken"]


def take_vocabulary(source: GPT2Source, place: str) -> None:
    """Give `source` the tokenizer at `place`, or the files to copy in its place.

    Args:
        place: a folder, or what `ScratchGPTTokenizer.from_pretrained` takes.

    Raises:
        ValueError: there is none, or one of GPT-2's kind is damaged.
    """
    folder = Path(place)
    if (folder / "meta.pkl").is_file():
        source.adopt(read_characters(folder / "meta.pkl"))
    elif files := other_vocabulary(folder):
        source.tokenizer, source.tokenizer_files = None, files
        source.config.tokenizer_class = _stated_class(folder)
    else:
        with told_as_error(place):
            source.adopt(ScratchGPTTokenizer.from_pretrained(place))


def has_vocabulary(folder: Path) -> bool:
    """Whether a vocabulary lies in `folder`."""
    return any(any(folder.glob(name)) for name in _VOCABULARIES)


def other_vocabulary(folder: Path) -> list[Path]:
    """The files of a vocabulary in `folder` that is not of GPT-2's kind; none if it is."""
    files = sorted({path for pattern in _VOCABULARIES for path in folder.glob(pattern)})
    if not files or (_stated_class(folder) in _GPT2S and _is_byte_level(folder)):
        return []
    settings = (folder / name for name in _SETTINGS)
    return [*files, *filter(Path.is_file, settings)]


def _stated_class(folder: Path) -> str | None:
    """The class of the tokenizer in `folder`, if a file there says it."""
    for path in (folder / "tokenizer_config.json", folder / "config.json"):
        stated = read_json(read_text(path), str(path)) if path.is_file() else {}
        if isinstance(name := stated.get("tokenizer_class"), str):
            return name
    return None


def _is_byte_level(folder: Path) -> bool:
    """Whether the vocabulary in `folder` is one of bytes and merges, of texts as they are."""
    path = folder / "tokenizer.json"
    if path.is_file():
        with told_as_error(path):
            described = read_json(read_text(path), str(path))
            model, splitter = described.get("model") or {}, described.get("pre_tokenizer") or {}
            is_byte_level = splitter.get("type") == "ByteLevel" and not described.get("normalizer")
            return is_byte_level and model.get("type", "BPE") == "BPE"
    return (folder / "merges.txt").is_file() or any(folder.glob("*.tiktoken"))


def read_characters(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of nanoGPT's `meta.pkl`, in which each character has an id."""
    with told_as_error(path):
        ids = plain_content(path)["stoi"]
        if not all(isinstance(sign, str) and len(sign) == 1 for sign in ids):
            raise ValueError("stoi has tokens that are not characters")
        if sorted(ids.values()) != list(range(len(ids))):
            raise ValueError("the ids in stoi do not count from 0 on")
        return character_tokenizer(ids)
