"""GPT-2's byte-level BPE tokenizer: transformers' interface, tiktoken's encoding."""

import json
import os
from typing import Any

import tiktoken
from transformers import PreTrainedTokenizer

END_OF_TEXT = "<|endoftext|>"

# GPT-2's split of a text into words, numbers, punctuation and white space, which BPE never merges
# across. It is the pattern of OpenAI's `encoder.py` with possessive quantifiers, which match the
# same faster.
SPLIT_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)


def byte_to_unicode() -> dict[int, str]:
    """The printable character by which vocabulary files write each byte.

    Bytes that are printable in Latin-1 stand for themselves; the others take the characters from
    U+0100 on (`bytes_to_unicode` in OpenAI's GPT-2 release).
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    characters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in characters:
            characters[byte] = chr(256 + len(characters) - len(printable))
    return characters


_BYTE_TO_UNICODE = byte_to_unicode()
_UNICODE_TO_BYTE = {character: byte for byte, character in _BYTE_TO_UNICODE.items()}


class ScratchGPTTokenizer(PreTrainedTokenizer):
    """Byte-level BPE with GPT-2's rules over any vocabulary of its kind.

    Args:
        vocab_file: JSON object of tokens and ids (`vocab.json`, OpenAI's `encoder.json`).
        merges_file: the merges in order, one a line (`merges.txt`, OpenAI's `vocab.bpe`).
        errors: how `decode` treats bytes that are no UTF-8, as in `bytes.decode`.
        bos_token, eos_token, pad_token, unk_token: all the end of text by default.
    """

    vocab_files_names = {"vocab_file": "vocab.json", "merges_file": "merges.txt"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | None = None,
        merges_file: str | None = None,
        errors: str = "replace",
        bos_token: str = END_OF_TEXT,
        eos_token: str = END_OF_TEXT,
        pad_token: str = END_OF_TEXT,
        unk_token: str = END_OF_TEXT,
        **kwargs: Any,
    ) -> None:
        if vocab_file is None or merges_file is None:
            raise FileNotFoundError("the vocabulary takes two files, vocab.json and merges.txt")
        with open(vocab_file, encoding="utf-8") as file:
            self.encoder: dict[str, int] = json.load(file)
        with open(merges_file, encoding="utf-8") as file:
            lines = file.read().split("\n")
        self.merges = [line for line in lines if line and not line.startswith("#version")]
        self.decoder = {token_id: token for token, token_id in self.encoder.items()}
        self.errors = errors

        ranks = {bytes([_UNICODE_TO_BYTE[c]]): self.encoder[c] for c in _BYTE_TO_UNICODE.values()}
        for merge in self.merges:
            token = merge.replace(" ", "")
            ranks[bytes(_UNICODE_TO_BYTE[c] for c in token)] = self.encoder[token]
        self.tiktoken = tiktoken.Encoding(
            "scratch_gpt", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        super().__init__(
            errors=errors,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            unk_token=unk_token,
            **kwargs,
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary files."""
        return len(self.encoder)

    def get_vocab(self) -> dict[str, int]:
        """All tokens, added ones too, and their ids."""
        return {**self.encoder, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self.decoder[token_id] for token_id in self.tiktoken.encode_ordinary(text)]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.encoder.get(token, self.encoder.get(str(self.unk_token)))

    def _convert_id_to_token(self, index: int) -> str:
        return self.decoder.get(index, str(self.unk_token))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join `tokens` to text."""
        pieces = []
        for token in tokens:
            if token in self.added_tokens_encoder:
                pieces.append(token.encode())
            else:
                pieces.append(bytes(_UNICODE_TO_BYTE[character] for character in token))
        return b"".join(pieces).decode("utf-8", errors=self.errors)

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, str]:
        """Write `vocab.json` and `merges.txt` to `save_directory`; return their paths."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        vocab_path = os.path.join(save_directory, prefix + self.vocab_files_names["vocab_file"])
        merges_path = os.path.join(save_directory, prefix + self.vocab_files_names["merges_file"])
        with open(vocab_path, "w", encoding="utf-8") as file:
            json.dump(self.encoder, file, ensure_ascii=False)
        with open(merges_path, "w", encoding="utf-8") as file:
            file.write("\n".join(["#version: 0.2", *self.merges, ""]))
        return vocab_path, merges_path


ScratchGPTTokenizer.register_for_auto_class("AutoTokenizer")
