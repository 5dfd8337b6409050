"""The two encoders, tiktoken and the tokenizers library, and what keeps them in step."""

from typing import Any

import tiktoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from .vocabulary_scratch_gpt import BYTE_TO_UNICODE, END_OF_TEXT, Vocabulary, token_bytes

# GPT-2's split of a text into words, numbers, punctuation and white space, which BPE never merges
# across. It is the pattern of OpenAI's `encoder.py` with possessive quantifiers, which match the
# same faster.
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# tiktoken's regular expressions give up, and take the process with them, on a million characters of
# white space in a row. A run of twice this length is noticed, and goes to the other encoder.
_LONG_SPACE = 10_000


# Switches of the tokenizers library that make another BPE of it.
_OTHER_BPE = ["dropout", "byte_fallback", "ignore_merges"]
_OTHER_BPE += ["continuing_subword_prefix", "end_of_word_suffix"]

# The post-processor that adds nothing.
_BARE = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])


def build_backend(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizers library's object: GPT-2's, or as the vocabulary's `tokenizer.json` says."""
    check_encoders(vocabulary)
    if vocabulary.description is None:
        backend = Tokenizer(models.BPE(vocabulary.ids, vocabulary.merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        return backend
    try:
        backend = Tokenizer.from_str(vocabulary.description)
    except Exception as error:  # the library has no narrower class
        raise ValueError(f"{vocabulary.origin} cannot be read: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def landmarks(vocabulary: Vocabulary) -> dict[str, int]:
    """Four of the merged tokens, from the first to the last, by which to know the merges again."""
    made = [left + right for left, right in vocabulary.merges]
    return {token: vocabulary.ids[token] for token in made[:: len(made) // 3 + 1] + made[-1:]}


def encodes_as_tiktoken(backend: Tokenizer, landmarks: dict[str, int]) -> bool:
    """Whether the tokenizers library's object still gives the ids that it was built for."""
    model, splitter, post = backend.model, backend.pre_tokenizer, backend.post_processor
    return (
        backend.normalizer is None
        and isinstance(splitter, pre_tokenizers.ByteLevel)
        and splitter.use_regex
        and not splitter.add_prefix_space
        and (isinstance(post, processors.ByteLevel) or post.__getstate__() == _BARE.__getstate__())
        and isinstance(model, models.BPE)
        and not any(getattr(model, name) for name in _OTHER_BPE)
        and all(
            model.token_to_id(token) == token_id and len(model.tokenize(token)) == 1
            for token, token_id in landmarks.items()
        )
    )


def check_encoders(vocabulary: Vocabulary) -> None:
    """Raise a ValueError unless merging makes each token by its own merge.

    tiktoken joins any two neighbours that make a token together, the tokenizers library only those
    whose merge is listed. `check` has refused merges of tokens that are made later or twice. Where
    each token's own bytes merge to it by the list, no other pair ever stands there to be joined,
    and the two give the same ids.
    """
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, vocabulary.merges))
    tokens = [left + right for left, right in vocabulary.merges]
    for number, encoding in enumerate(tokenizer.encode_batch_fast(tokens)):
        if len(encoding) != 1:
            raise ValueError(
                f"{vocabulary.where(number)} makes {tokens[number]!r}, but merging in the order of "
                f"the list gives {tokenizer.encode(tokens[number]).tokens} for it; tiktoken cannot "
                "encode with such a list"
            )


def build_tiktoken(vocabulary: Vocabulary) -> tuple[tiktoken.Encoding, list[int] | None]:
    """tiktoken's object, and the id of each of its ranks where they differ."""
    ids = vocabulary.ids
    in_order = [*sorted(BYTE_TO_UNICODE.values(), key=ids.__getitem__)]
    in_order += [left + right for left, right in vocabulary.merges]
    id_of_rank = [ids[token] for token in in_order]
    same = id_of_rank == list(range(len(in_order)))
    encoding = tiktoken.Encoding(
        "scratch_gpt",
        pat_str=SPLIT_PATTERN,
        mergeable_ranks={token_bytes(token): rank for rank, token in enumerate(in_order)},
        special_tokens={END_OF_TEXT: ids[END_OF_TEXT]} if same and END_OF_TEXT in ids else {},
    )
    return encoding, None if same else id_of_rank


def suits_tiktoken(text: str, added: list[str]) -> bool:
    """Whether `text` holds none of the `added` tokens and no long run of white space."""
    if any(token in text for token in added):
        return False
    starts = range(0, len(text) - _LONG_SPACE, _LONG_SPACE)
    return not any(text[start : start + _LONG_SPACE].isspace() for start in starts)


def mended(text: Any) -> Any:
    """`text`, a string or nested lists of them, with surrogates as tiktoken reads them."""
    if isinstance(text, (list, tuple)):
        parts = [mended(part) for part in text]
        if all(part is before for part, before in zip(parts, text, strict=True)):
            return text
        return tuple(parts) if isinstance(text, tuple) else parts
    if not isinstance(text, str) or text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
