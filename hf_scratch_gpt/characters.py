"""A tokenizer in which each character has an id, and texts with characters that have none."""

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast


def character_tokenizer(ids: dict[str, int], **special: str) -> PreTrainedTokenizerFast:
    """The tokenizer of nanoGPT's character-level models.

    A character that has no id raises an error, as it does there.

    Args:
        ids: characters, and special tokens, to ids.
        special: which of them are special, such as `eos_token`.
    """
    backend = Tokenizer(models.WordLevel(ids))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special
    )


def encoded(
    tokenizer: PreTrainedTokenizerBase, texts: str | list[str], **options: Any
) -> BatchEncoding:
    """What `tokenizer` makes of a text or of several, of any length.

    Raises:
        ValueError: a text has a character that the vocabulary lacks.
    """
    try:
        return tokenizer(texts, verbose=False, **options)
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library raises no other class
            raise
        lacking = sorted(set("".join(texts)) - tokenizer.get_vocab().keys())
        shown = ", ".join(map(repr, lacking[:5])) + (" and others" if len(lacking) > 5 else "")
        raise ValueError(
            f"the tokenizer cannot encode the text ({error}): no token is {shown}; leave out such "
            "characters, or train a model on texts that have them"
        ) from None
