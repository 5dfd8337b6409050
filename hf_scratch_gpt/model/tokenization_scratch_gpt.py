"""The tokenizer: tiktoken's encoding under transformers' interface.

Ids come from tiktoken while the tokenizer's backend is GPT-2's. What goes beyond ids (offsets,
words, overflow, pairs, added tokens inside a text), and any other backend, is encoded by the
tokenizers library, which transformers' fast tokenizers are built on; it runs the same merges,
several times slower. `check_encoders` makes sure that both agree on every token.
"""

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tiktoken
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PaddingStrategy, TruncationStrategy

from .bpe_scratch_gpt import (
    build_backend,
    build_tiktoken,
    encodes_as_tiktoken,
    landmarks,
    mended,
    suits_tiktoken,
)
from .vocabulary_scratch_gpt import END_OF_TEXT, read_json, read_text, read_vocabulary

# From here on, in characters, a batch is worth threads.
_LARGE_BATCH = 1 << 20

# Looking for each of so many added tokens takes longer than the other encoder.
_MANY_ADDED = 20

# Arguments that concern ids alone; any other one that is set asks for the other encoder.
_OPTIONS_ON_IDS = {
    "add_special_tokens",
    "max_length",
    "pad_to_multiple_of",
    "padding_side",
    "padding_strategy",
    "return_attention_mask",
    "return_tensors",
    "split_special_tokens",
    "truncation_strategy",
    "verbose",
}


class _Alignment(Sequence):
    """Encodings by the tokenizers library, computed when the first of them is asked for.

    `lengths` are those of each text after truncation, and after padding.
    """

    def __init__(
        self,
        backend: Tokenizer,
        texts: list[str],
        lengths: list[tuple[int, int]],
        cut_at: str,
        **padding: Any,
    ) -> None:
        # Nothing that is set later changes the alignment of texts that are encoded already.
        self._aligner = Tokenizer(backend.model)
        self._aligner.pre_tokenizer = backend.pre_tokenizer
        self._aligner.post_processor = backend.post_processor
        self._texts, self._lengths, self._cut_at, self._padding = texts, lengths, cut_at, padding

    @cached_property
    def _encodings(self) -> list[Any]:
        encodings = self._aligner.encode_batch(self._texts)
        for encoding, (kept, padded) in zip(encodings, self._lengths, strict=True):
            encoding.truncate(kept, direction=self._cut_at)
            encoding.pad(padded, **self._padding)
        return encodings

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: Any) -> Any:
        return self._encodings[index]

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


class ScratchGPTTokenizer(PreTrainedTokenizerFast):
    """Byte-level BPE with GPT-2's rules, over any vocabulary of its kind.

    What is set on `backend_tokenizer` counts; tiktoken encodes only while that splits as GPT-2
    does. Padding is on the left, with the end of text. A lone surrogate in a text, which has no
    UTF-8 form, is read as U+FFFD, the replacement character, and a pair of surrogates as the
    character that it stands for.

    Args:
        vocab: tokens and their ids, or the path of `vocab.json`, of OpenAI's `encoder.json`, or of
            a `.tiktoken` file of ranks.
        merges: the merges in their order, or the path of `merges.txt` or of OpenAI's `vocab.bpe`;
            not with a `.tiktoken` file.
        tokenizer_file: the path of `tokenizer.json`; it counts where the two are given as well.
        tokenizer_object: a `tokenizers.Tokenizer` in place of files.
        errors: kept for GPT-2's sake; bytes that are not UTF-8 decode to U+FFFD.
        bos_token, eos_token, pad_token, unk_token: all the end of text by default.
        add_prefix_space: put a space before a text that begins without one.
        vocab_file, merges_file: other names of `vocab` and `merges`.

    Raises:
        ValueError: the vocabulary is missing, damaged or inconsistent; names file and line or
            token.
    """

    vocab_files_names = {
        "vocab_file": "vocab.json",
        "merges_file": "merges.txt",
        "tokenizer_file": "tokenizer.json",
    }
    model_input_names = ["input_ids", "attention_mask"]
    model = models.BPE  # by which tools choose the form of `vocab` that they hand over
    padding_side = "left"

    def __init__(
        self,
        vocab: Any = None,
        merges: Any = None,
        tokenizer_file: str | None = None,
        tokenizer_object: Tokenizer | None = None,
        errors: str = "replace",
        bos_token: Any = END_OF_TEXT,
        eos_token: Any = END_OF_TEXT,
        pad_token: Any = END_OF_TEXT,
        unk_token: Any = END_OF_TEXT,
        add_prefix_space: bool = False,
        vocab_file: Any = None,
        merges_file: Any = None,
        **kwargs: Any,
    ) -> None:
        named = dict(bos_token=bos_token, eos_token=eos_token, unk_token=unk_token)
        named["pad_token"] = eos_token if pad_token is None else pad_token
        special = [*named.values(), *(kwargs.get("extra_special_tokens") or [])]
        special += (kwargs.get("added_tokens_decoder") or {}).values()
        vocabulary = read_vocabulary(
            vocab or vocab_file, merges or merges_file, tokenizer_file, tokenizer_object, special
        )
        self._tokenizer = build_backend(vocabulary)
        splitter = self._tokenizer.pre_tokenizer
        if isinstance(splitter, pre_tokenizers.ByteLevel):
            splitter.add_prefix_space |= add_prefix_space
            add_prefix_space = splitter.add_prefix_space
        self._tiktoken, self._id_of_rank = build_tiktoken(vocabulary)
        self._landmarks = landmarks(vocabulary)
        kwargs.setdefault("padding_side", self.padding_side)  # so that it is saved
        super().__init__(errors=errors, add_prefix_space=add_prefix_space, **named, **kwargs)

    @classmethod
    def convert_to_native_format(cls, **kwargs: Any) -> dict[str, Any]:
        """Leave the files to `__init__`, which checks them."""
        kwargs.pop("trust_remote_code", None)
        return kwargs

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> "ScratchGPTTokenizer":
        """Load from a folder in any of the formats, a `.tiktoken` file, or a hub id.

        Where a folder has several, `tokenizer.json` counts. Beside a model, truncation is at most
        at its last position.
        """
        source = pretrained_model_name_or_path
        path = Path(source, kwargs.get("subfolder", ""))
        ranks = [path] if path.suffix == ".tiktoken" else sorted(path.glob("*.tiktoken"))
        usual = [name for name in cls.vocab_files_names.values() if (path / name).is_file()]
        if not usual and (path / "encoder.json").is_file():
            kwargs.setdefault("vocab_file", str(path / "encoder.json"))
            kwargs.setdefault("merges_file", str(path / "vocab.bpe"))
        elif not usual and ranks:
            if len(ranks) > 1:
                names = ", ".join(rank.name for rank in ranks)
                raise ValueError(f"{path} has several vocabularies: {names}; name one of the files")
            kwargs.setdefault("vocab_file", str(ranks[0]))
            source = ranks[0].parent
        loaded = super().from_pretrained(source, *args, **kwargs)
        if "model_max_length" not in kwargs and (path / "config.json").is_file():
            config = read_json(read_text(path / "config.json"), str(path / "config.json"))
            positions = config.get("max_position_embeddings", config.get("n_positions"))
            if isinstance(positions, int):
                loaded.model_max_length = min(loaded.model_max_length, positions)
        return loaded

    @property
    def tiktoken(self) -> tiktoken.Encoding:
        """The tiktoken object that encodes.

        Its numbers are the vocabulary's ids where, as in GPT-2's, ids follow the order of the
        merges; otherwise they count bytes first, then merges, and it knows no special token.
        """
        return self._tiktoken

    def _encode_plus(self, text: Any, text_pair: Any = None, **options: Any) -> BatchEncoding:
        """Encode; transformers calls this for every way of calling the tokenizer."""
        text, text_pair = mended(text), mended(text_pair)
        texts = [text] if isinstance(text, str) else text
        paired = text_pair if isinstance(text, str) else text_pair is not None
        if paired or not self._gives_ids_alone(texts, options):
            return super()._encode_plus(text, text_pair=text_pair, **options)

        rows, limit = self._encode_ordinary(texts), options.get("max_length")
        keep = TruncationStrategy.DO_NOT_TRUNCATE
        if limit is not None and options.get("truncation_strategy", keep) != keep:
            is_right = self.truncation_side == "right"
            rows = [ids[:limit] if is_right else ids[max(0, len(ids) - limit) :] for ids in rows]
        for ids in rows:
            self._eventual_warn_about_too_long_sequence(ids, limit, options.get("verbose", True))
        names = "max_length", "pad_to_multiple_of", "padding_side", "return_attention_mask"
        padded = self.pad(
            {"input_ids": rows},
            padding=options.get("padding_strategy", PaddingStrategy.DO_NOT_PAD),
            **{name: options.get(name) for name in names},
        )
        alignment = _Alignment(
            self._tokenizer,
            list(texts),
            list(zip(map(len, rows), map(len, padded["input_ids"]), strict=True)),
            cut_at=self.truncation_side,
            direction=options.get("padding_side") or self.padding_side,
            pad_id=self.pad_token_id,
            pad_token=self.pad_token,
        )
        tensors, data = options.get("return_tensors"), dict(padded)
        if isinstance(text, str) and tensors is None:
            data = {name: values[0] for name, values in data.items()}
        return BatchEncoding(data, alignment, tensor_type=tensors, n_sequences=1)

    def _gives_ids_alone(self, texts: Any, options: dict[str, Any]) -> bool:
        """Whether tiktoken can do it: plain strings, GPT-2's way to split, and ids alone."""
        if not isinstance(texts, (list, tuple)) or not texts:
            return False
        if any(value for name, value in options.items() if name not in _OPTIONS_ON_IDS):
            return False
        if options.get("truncation_strategy") == TruncationStrategy.ONLY_SECOND:
            return False
        numbers = (options.get("max_length"), options.get("pad_to_multiple_of"))
        if any(number is not None and number < 0 for number in numbers):
            return False  # refused there
        if "token_type_ids" in self.model_input_names:
            return False
        if not encodes_as_tiktoken(self._tokenizer, self._landmarks):
            return False
        split = options.get("split_special_tokens")
        split = self.split_special_tokens if split is None else split
        added = self._tokenizer.get_added_tokens_decoder().values()
        sought = [token.content for token in added if not (token.special and split)]
        if len(sought) > _MANY_ADDED:
            return False
        return all(isinstance(text, str) and suits_tiktoken(text, sought) for text in texts)

    def _encode_ordinary(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of plain texts."""
        if len(texts) > 1 and sum(map(len, texts)) > _LARGE_BATCH:
            rows = self._tiktoken.encode_ordinary_batch(
                list(texts), num_threads=os.cpu_count() or 1
            )
        else:
            rows = [self._tiktoken.encode_ordinary(text) for text in texts]
        if self._id_of_rank is None:
            return rows
        return [[self._id_of_rank[rank] for rank in ranks] for ranks in rows]

    def _save_pretrained(
        self, save_directory: Any, file_names: tuple[str, ...], *args: Any, **kwargs: Any
    ) -> tuple[str, ...]:
        # A call leaves them in the backend, and other tools would cut and pad by them.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        saved = super()._save_pretrained(save_directory, file_names, *args, **kwargs)
        return saved + self.save_vocabulary(save_directory, kwargs.get("filename_prefix"))

    def save_vocabulary(
        self, save_directory: Any, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write `vocab.json` and `merges.txt` to `save_directory`; return their paths."""
        model = json.loads(self._tokenizer.to_str())["model"]
        if "merges" not in model:
            return ()  # another model was put in; tokenizer.json says all about it
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        vocab_path = Path(save_directory) / f"{prefix}vocab.json"
        merges_path = Path(save_directory) / f"{prefix}merges.txt"
        vocab_path.write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        merges = ["#version: 0.2", *map(" ".join, model["merges"]), ""]
        merges_path.write_text("\n".join(merges), encoding="utf-8", newline="\n")
        return str(vocab_path), str(merges_path)


ScratchGPTTokenizer.register_for_auto_class("AutoTokenizer")
