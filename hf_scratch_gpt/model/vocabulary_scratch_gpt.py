"""Read a byte-level BPE vocabulary of GPT-2's kind from any of its file formats, and check it.

A vocabulary is a list of tokens, each a string of bytes with an id, and a list of merges: the pairs
of tokens that BPE joins, the most frequent first (Sennrich et al. 2016; over bytes: Radford et al.
2019).
"""

import base64
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

END_OF_TEXT = "<|endoftext|>"

# Bounds of bytes, and of entries, for files that are read whole; 250 thousand tokens fit.
_LARGEST_TEXT, _MOST_ENTRIES = 1 << 25, 1 << 20
# Making a token by merges takes the square of its length; those of GPT-2 add up to 4 million.
_MOST_SQUARES = 1 << 25


def byte_to_unicode() -> dict[int, str]:
    """The printable character by which vocabulary files write each byte.

    Bytes that are printable in Latin-1 stand for themselves; the others take the characters from
    U+0100 on (`bytes_to_unicode` in OpenAI's GPT-2 release).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters.update({byte: chr(256 + index) for index, byte in enumerate(others)})
    return characters


BYTE_TO_UNICODE = byte_to_unicode()
_TO_LATIN_1 = {ord(character): byte for byte, character in BYTE_TO_UNICODE.items()}


def token_bytes(token: str) -> bytes:
    """The bytes of a token as a vocabulary file writes it."""
    return token.translate(_TO_LATIN_1).encode("latin-1")


def token_text(token: bytes) -> str:
    """A token of these bytes as a vocabulary file writes it."""
    return token.decode("latin-1").translate(BYTE_TO_UNICODE)


@dataclass
class Vocabulary:
    """Tokens with their ids, and merges in their order; tokens are written as in vocabulary files.

    `origin` and `lines` say, for messages, which file the merges stand in and in which lines;
    `description` is the `tokenizer.json` that it was read from, and `added` its added tokens.
    """

    ids: dict[str, int]
    merges: list[tuple[str, str]]
    origin: str
    lines: list[int] = field(default_factory=list)
    description: str | None = None
    added: set[str] = field(default_factory=set)

    def where(self, merge: int) -> str:
        """The place of merge number `merge`, for an error message."""
        return f"{self.origin}, line {self.lines[merge]}" if self.lines else self.origin


def read_vocabulary(
    vocab: Any, merges: Any, file: str | None, backend: Any, special: Sequence[Any]
) -> Vocabulary:
    """Read the vocabulary from what the tokenizer is given, and check it.

    A `tokenizer.json`, that of `file` or as `backend` would write it, comes first; no merge needs
    to make a token that is `special`. A ValueError names file and line or token.
    """
    if backend is not None:
        vocabulary = read_description(backend.to_str(), "tokenizer_object")
    elif file is not None:
        vocabulary = read_description(read_text(Path(file)), str(file))
    elif isinstance(vocab, dict):
        vocabulary = read_content(vocab, merges, "vocab and merges")
    elif vocab is not None and not isinstance(vocab, (str, os.PathLike)):
        raise ValueError(
            f"vocab is a {type(vocab).__name__}; give a dictionary from tokens to ids, or a path"
        )
    elif vocab is not None and Path(vocab).suffix == ".tiktoken":
        vocabulary = read_ranks(Path(vocab))
    elif vocab is not None and merges is not None:
        vocabulary = read_pair(Path(vocab), Path(merges))
    else:
        raise ValueError(
            "a vocabulary takes vocab.json and merges.txt (or encoder.json and vocab.bpe), a "
            f"tokenizer.json or a .tiktoken file; there is {vocab or merges or 'no file'}"
        )
    check(vocabulary, vocabulary.added.union(map(str, special)))
    return vocabulary


def read_text(path: Path) -> str:
    """The text of a vocabulary file."""
    if not path.is_file():
        raise ValueError(f"{path} is missing, or is not a file")
    if (size := path.stat().st_size) > _LARGEST_TEXT:
        raise ValueError(f"{path} has {size} bytes, over {_LARGEST_TEXT}; is it the right file?")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}; fetch it again") from None


def read_json(text: str, origin: str) -> Any:
    """The JSON object in `text`, in which no key may occur twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"{origin} has {twice!r} twice")
        return keys

    if sum(map(text.count, ",[{")) > _MOST_ENTRIES:
        raise ValueError(f"{origin} has over {_MOST_ENTRIES} entries; is it the right file?")
    try:
        content = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{origin} is not complete JSON at line {error.lineno}, column {error.colno} "
            f"({error.msg}); fetch it again"
        ) from None
    except (RecursionError, ValueError) as error:
        if origin in str(error):
            raise
        raise ValueError(f"{origin} is nested too deeply, or has a number too long") from None
    if not isinstance(content, dict):
        raise ValueError(f"{origin} is not a JSON object; is it the right file?")
    return content


def read_pair(vocab_path: Path, merges_path: Path) -> Vocabulary:
    """Read OpenAI's or transformers' pair of files."""
    ids = read_json(read_text(vocab_path), str(vocab_path))
    check_ids(ids, str(vocab_path))
    merges, lines = [], []
    for number, line in enumerate(read_text(merges_path).split("\n"), start=1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            where = f"{merges_path}, line {number}"
            raise ValueError(f"{where} is not two tokens with a space between: {line!r}")
        merges.append((parts[0], parts[1]))
        lines.append(number)
    return Vocabulary(ids, merges, str(merges_path), lines)


def read_description(text: str, origin: str) -> Vocabulary:
    """Read the text of a `tokenizer.json`."""
    content = read_json(text, origin)
    model, added = content.get("model"), content.get("added_tokens") or []
    if isinstance(model, dict) and model.get("type", "BPE") != "BPE":
        raise ValueError(
            f"{origin} has a model of type {model['type']!r}, not a byte-level BPE; load it with "
            "transformers' PreTrainedTokenizerFast"
        )
    shapes = (model, dict), (added, list), (isinstance(model, dict) and model.get("vocab"), dict)
    if not all(isinstance(value, kind) for value, kind in shapes) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) for token in added
    ):
        raise ValueError(f"{origin} lacks a vocabulary, or has added tokens without content")
    added_ids = [token.get("id") for token in added]
    vocabulary = read_content(model["vocab"], model.get("merges"), origin, added_ids)
    vocabulary.description, vocabulary.added = text, {token["content"] for token in added}
    return vocabulary


def read_content(
    ids: dict[str, int], written: Any, origin: str, added: Sequence[int] = ()
) -> Vocabulary:
    """The vocabulary of `ids`, and of merges that are pairs or written "a b"."""
    check_ids(ids, origin, added)
    merges = []
    for merge in written or []:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        is_pair = isinstance(parts, (list, tuple)) and len(parts) == 2
        if not is_pair or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{origin} has the merge {merge!r}, which is not two tokens")
        merges.append((parts[0], parts[1]))
    return Vocabulary(ids, merges, origin)


def read_ranks(path: Path) -> Vocabulary:
    """Read tiktoken's file of tokens in base64 and ranks; the end of text gets the next id."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line:
            continue
        try:
            encoded, written = line.split(" ")
            token, rank = base64.b64decode(encoded, validate=True), int(written)
        except ValueError:
            raise ValueError(
                f"{path}, line {number} is not a token in base64 and its rank: {line!r}"
            ) from None
        if token in ranks:
            raise ValueError(f"{path}, line {number} has token {token!r} a second time")
        ranks[token] = rank
    ids = {token_text(token): rank for token, rank in ranks.items()}
    check_ids(ids, str(path))
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = parts_before(token, rank, ranks)
        if len(parts) == 2:
            merges.append((token_text(parts[0]), token_text(parts[1])))
        elif len(token) > 1 and not _is_markup(token_text(token)):
            raise ValueError(f"{path}: no two tokens of lower rank make {token!r} (rank {rank})")
    ids.setdefault(END_OF_TEXT, len(ids))
    return Vocabulary(ids, merges, str(path))


def parts_before(token: bytes, rank: int, ranks: dict[bytes, int]) -> list[bytes]:
    """What BPE makes of `token` by merges of lower rank than its own."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        candidates = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
        lowest = min(candidates)
        if lowest >= rank:
            break
        place = candidates.index(lowest)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def check_ids(ids: dict[str, int], origin: str, added: Sequence[int] = ()) -> None:
    """Raise a ValueError unless the ids count from 0 on without a gap or a repetition."""
    if (squares := sum(len(token) ** 2 for token in ids)) > _MOST_SQUARES:
        raise ValueError(
            f"{origin} has tokens too long to merge: the squares of their lengths add up to "
            f"{squares}, over {_MOST_SQUARES}"
        )
    by_id: dict[int, str] = {}
    for token, token_id in ids.items():
        if any(0xD800 <= ord(character) < 0xE000 for character in token):
            raise ValueError(f"{origin}: token {token!r} holds a lone surrogate")
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise ValueError(f"{origin}: token {token!r} has {token_id!r} for an id")
        if (other := by_id.setdefault(token_id, token)) != token:
            raise ValueError(f"{origin}: tokens {other!r} and {token!r} share id {token_id}")
    if missing := set(range(len(by_id))) - by_id.keys() - set(added):
        number = min(missing)
        raise ValueError(f"{origin} has no token with id {number}, and ids count without a gap")


def _is_markup(token: str) -> bool:
    """Whether `token` looks like a special one, <|endoftext|> or [PAD]."""
    return re.fullmatch(r"<.*>|\[.*\]", token, flags=re.DOTALL) is not None


def check(vocabulary: Vocabulary, special: set[str]) -> None:
    """Raise a ValueError unless bytes and merges make every token that is not `special`."""
    ids = vocabulary.ids
    for byte, character in BYTE_TO_UNICODE.items():
        if character not in ids:
            raise ValueError(
                f"{vocabulary.origin}: byte {byte:#04x} has no token ({character!r}); a byte-level "
                "vocabulary has one for each"
            )
    made = set(BYTE_TO_UNICODE.values())
    for number, (left, right) in enumerate(vocabulary.merges):
        where, merged = vocabulary.where(number), left + right
        if merged not in ids:
            raise ValueError(
                f"{where} merges {left!r} and {right!r}, but {merged!r} is not a token"
            )
        for token in (left, right):
            if token not in made:
                raise ValueError(f"{where} merges {token!r}, which no earlier merge has made")
        if merged in made:
            raise ValueError(f"{where} makes {merged!r}, which an earlier merge has made")
        made.add(merged)
    for token in ids.keys() - made:
        if token not in special and not _is_markup(token):
            raise ValueError(
                f"{vocabulary.origin} has no merge that makes token {token!r} (id {ids[token]}): "
                "it is cut short, or belongs to another vocabulary"
            )
