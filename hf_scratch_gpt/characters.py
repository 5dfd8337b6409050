"""A tokenizer in which each character has an id."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


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
