"""The vocabulary of a model that is trained from nothing: GPT-2's own, or one made of its texts."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import try_to_load_from_cache
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..characters import character_tokenizer
from ..files import give_memory_back, new_file
from ..model.tokenization_scratch_gpt import ScratchGPTTokenizer
from ..model.vocabulary_scratch_gpt import END_OF_TEXT
from .corpus import CACHE, places_of
from .texts import Sources, find, read, size_of

# Where GPT-2's vocabulary is in Hugging Face's cache, if any program has ever fetched it.
_GPT2_REPOSITORIES = ("openai-community/gpt2", "gpt2")
# A BPE vocabulary is counted on so many bytes at most, spread evenly over the texts.
_COUNTED = 1 << 24
_SMALLEST, _LARGEST = 512, 8192
_MOST = 1_000_000
_BYTES = 256  # tokens that every byte-level vocabulary has, beside the end of a text


def is_recipe(tokenizer: Any) -> bool:
    """Whether `tokenizer` says how to make a vocabulary: "char", "bpe", or "bpe:" and its size."""
    return isinstance(tokenizer, str) and re.fullmatch("char|bpe(:.*)?", tokenizer) is not None


def gpt2_vocabulary() -> ScratchGPTTokenizer | None:
    """GPT-2's own tokenizer, if its files are in Hugging Face's cache on this machine."""
    for repository in _GPT2_REPOSITORIES:
        found = [try_to_load_from_cache(repository, name) for name in ("vocab.json", "merges.txt")]
        if all(isinstance(path, str) for path in found):
            return ScratchGPTTokenizer(*found)
    return None


def make_vocabulary(
    recipe: str,
    sources: Sources,
    text_field: str = "text",
    cache_dir: str | os.PathLike[str] | None = None,
    on_notice: Callable[[str], None] = lambda line: None,
) -> PreTrainedTokenizerBase:
    """Make a tokenizer of the texts that are trained on, or find that of an earlier time.

    Args:
        recipe: "char", every character of the texts; "bpe:4096", byte-level BPE (Radford et al.
            2019, section 2.2) of so many tokens; "bpe", of as many as suit the amount of text.
        sources, text_field, cache_dir: see `tokenize`.
        on_notice: is called with a line that says what was made.

    Raises:
        ValueError: the size is not a number from 257 to a million, or a source is missing or bad.
    """
    found = find(sources)
    size = sum(map(size_of, found))
    if recipe == "bpe":
        recipe = f"bpe:{_fitting_size(size)}"
    kind, _, tokens = recipe.partition(":")
    if kind == "bpe" and not (tokens.isdecimal() and _BYTES < int(tokens) <= _MOST):
        raise ValueError(
            f"tokenizer={recipe} does not name a size; give a number above {_BYTES}, the bytes, "
            f"and at most {_MOST:,}, such as bpe:4096"
        )
    key = json.dumps([recipe, text_field, places_of(found)], default=str)
    folder = CACHE if cache_dir is None else Path(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    path = folder / f"{name}.vocabulary"
    with FileLock(folder / f"{name}.ids.lock"):  # `clear_cache` takes it too
        if not path.is_file():
            texts = _texts(found, text_field, size if kind == "char" else _COUNTED)
            made = _characters(texts) if kind == "char" else _byte_pairs(texts, int(tokens))
            with new_file(path) as unfinished:
                unfinished.write_text(made.backend_tokenizer.to_str(), encoding="utf-8")
        tokenizer = _load(path, kind)
    what = "characters" if kind == "char" else "byte-level BPE"
    on_notice(f"Vocabulary: {len(tokenizer):,} tokens, {what}, made of these texts")
    return tokenizer


def _fitting_size(size: int) -> int:
    """A power of two, about one token for each 128 to 256 bytes of text, within bounds."""
    return min(_LARGEST, max(_SMALLEST, 1 << (size // 128 or 1).bit_length() - 1))


def _texts(found: list[Any], field: str, limit: int) -> Iterator[str]:
    """Texts of about `limit` bytes in all, spread evenly over the sources."""
    share, read_, taken = min(1.0, limit / (sum(map(size_of, found)) or 1)), 0.0, 0.0
    for source in found:
        for piece in read(source, field):
            read_ += piece.size
            if taken <= share * read_:
                taken += piece.size
                yield piece.text


def _byte_pairs(texts: Iterator[str], size: int) -> PreTrainedTokenizerFast:
    trained, sample = ByteLevelBPETokenizer(), list(texts)
    options = dict(vocab_size=size, special_tokens=[END_OF_TEXT], show_progress=False)
    # A thread's memory is apart from this one's, and so is given back whole.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(trained.train_from_iterator, sample, **options).result()
    model = json.loads(trained.to_str())["model"]
    del trained, sample
    give_memory_back()
    return ScratchGPTTokenizer(vocab=model["vocab"], merges=[*map(tuple, model["merges"])])


def _characters(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    signs: set[str] = set()
    for text in texts:
        signs.update(text)
    ids = {sign: number for number, sign in enumerate([*sorted(signs), END_OF_TEXT])}
    return character_tokenizer(ids, eos_token=END_OF_TEXT)


def _load(path: Path, kind: str) -> PreTrainedTokenizerFast:
    if kind == "bpe":
        return ScratchGPTTokenizer(tokenizer_file=str(path))
    ids = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    return character_tokenizer(ids, eos_token=END_OF_TEXT)
