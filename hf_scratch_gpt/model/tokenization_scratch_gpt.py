"""The tokenizer: tiktoken's encoding under transformers' interface.

Ids come from tiktoken. What goes beyond ids (offsets, words, overflow, pairs, added tokens inside a
text) comes from the tokenizers library, which transformers' fast tokenizers are built on; it runs
the same merges, several times slower. `check_encoders` makes sure that both agree on every token.
"""

import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tiktoken
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PaddingStrategy, TruncationStrategy

from .bpe_scratch_gpt import build_tiktoken, check_encoders, mended, suits_tiktoken
from .vocabulary_scratch_gpt import END_OF_TEXT, read_text, read_tokenizer_json, read_vocabulary

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
    """Encodings by the tokenizers library, computed when the first of them is asked for."""

    def __init__(self, count: int, compute: Callable[[], list[Any]]) -> None:
        self._count = count
        self._encodings = cache(compute)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return self._encodings()[index]

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


class ScratchGPTTokenizer(PreTrainedTokenizerFast):
    """Byte-level BPE with GPT-2's rules, over any vocabulary of its kind.

    It pads on the left, with the end of text. A lone surrogate in a text, which has no UTF-8 form,
    is read as U+FFFD, the replacement character, and a pair of surrogates as the character that it
    stands for.

    Args:
        vocab_file: `vocab.json`, OpenAI's `encoder.json`, or a `.tiktoken` file of ranks.
        merges_file: `merges.txt` or OpenAI's `vocab.bpe`; not with a `.tiktoken` file.
        tokenizer_file: `tokenizer.json`, in place of the two files.
        tokenizer_object: a `tokenizers.Tokenizer` in place of files.
        errors: kept for GPT-2's sake; bytes that are not UTF-8 decode to U+FFFD.
        bos_token, eos_token, pad_token, unk_token: all the end of text by default.
        add_prefix_space: put a space before a text that begins without one.

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
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | None = None,
        merges_file: str | None = None,
        tokenizer_file: str | None = None,
        tokenizer_object: Tokenizer | None = None,
        errors: str = "replace",
        bos_token: Any = END_OF_TEXT,
        eos_token: Any = END_OF_TEXT,
        pad_token: Any = END_OF_TEXT,
        unk_token: Any = END_OF_TEXT,
        add_prefix_space: bool = False,
        **kwargs: Any,
    ) -> None:
        described = None
        if tokenizer_object is not None:
            described = read_tokenizer_json(tokenizer_object.to_str(), "tokenizer_object")
        elif tokenizer_file is not None:
            path = Path(tokenizer_file)
            described = read_tokenizer_json(read_text(path), str(path))
        if described is not None:
            add_prefix_space |= bool(described["pre_tokenizer"].get("add_prefix_space"))
            _take_settings(described, kwargs)
        pad_token = eos_token if pad_token is None else pad_token
        special = [bos_token, eos_token, pad_token, unk_token]
        special += kwargs.get("extra_special_tokens") or []
        special += (kwargs.get("added_tokens_decoder") or {}).values()
        vocabulary = self._vocabulary = read_vocabulary(
            vocab_file and os.fspath(vocab_file), merges_file, described, set(map(str, special))
        )
        self._tokenizer = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=vocabulary.merges))
        check_encoders(vocabulary, self._tokenizer)
        # The same model without added tokens, truncation and padding: nothing that is set later
        # changes the alignment of texts that are encoded already.
        self._aligner = Tokenizer(self._tokenizer.model)
        self._aligner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._aligner.post_processor = processors.TemplateProcessing(
            single="$A:0", pair="$A:0 $B:1", special_tokens=[]
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
        self._tokenizer.decoder = decoders.ByteLevel()
        self._tiktoken, self._id_of_rank = build_tiktoken(vocabulary)
        self._added: list[tuple[str, bool]] = []
        kwargs.setdefault("padding_side", self.padding_side)  # so that it is saved
        super().__init__(
            errors=errors,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            unk_token=unk_token,
            add_prefix_space=add_prefix_space,
            **kwargs,
        )
        self._added = self._added_tokens()

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

        Where a folder has `vocab.json` and `merges.txt` beside `tokenizer.json`, the two count, and
        the third adds its added tokens.
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
        return super().from_pretrained(source, *args, **kwargs)

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

        rows = self._truncated(self._encode_ordinary(texts), options)
        for ids in rows:
            self._eventual_warn_about_too_long_sequence(
                ids, options.get("max_length"), options.get("verbose", True)
            )
        alignment = self._alignment(list(texts), rows, options)
        data: dict[str, Any] = self._padded(rows, options)
        wanted = options.get("return_attention_mask")
        if wanted is None:
            wanted = "attention_mask" in self.model_input_names
        if not wanted:
            del data["attention_mask"]
        tensors = options.get("return_tensors")
        if isinstance(text, str) and tensors is None:
            data = {name: values[0] for name, values in data.items()}
        return BatchEncoding(data, alignment, tensor_type=tensors, n_sequences=1)

    def _alignment(
        self, texts: list[str], rows: list[list[int]], options: dict[str, Any]
    ) -> _Alignment:
        """Offsets and words of `texts`, whose ids, truncated but not padded, are `rows`."""
        lengths = [len(ids) for ids in rows]
        width, aligner = self._width(rows, options), self._aligner
        truncated_at = self.truncation_side
        padding = dict(pad_id=self.pad_token_id, pad_token=self.pad_token) if width else {}
        padded_at = options.get("padding_side") or self.padding_side

        def compute() -> list[Any]:
            encodings = aligner.encode_batch(texts)
            for encoding, length in zip(encodings, lengths, strict=True):
                if len(encoding) > length:
                    encoding.truncate(length, direction=truncated_at)
                if width:
                    encoding.pad(width, direction=padded_at, **padding)
            return list(encodings)

        return _Alignment(len(texts), compute)

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """Split `text` into tokens as the vocabulary writes them."""
        encoded = super()._encode_plus(
            mended(text), text_pair=mended(pair), add_special_tokens=add_special_tokens, **kwargs
        )
        return encoded.tokens()

    def _gives_ids_alone(self, texts: Any, options: dict[str, Any]) -> bool:
        """Whether tiktoken can do it: plain strings, and no option that asks for more than ids."""
        if not isinstance(texts, (list, tuple)) or not texts or self.add_prefix_space:
            return False
        if any(value for name, value in options.items() if name not in _OPTIONS_ON_IDS):
            return False
        if options.get("truncation_strategy") == TruncationStrategy.ONLY_SECOND:
            return False
        numbers = (options.get("max_length"), options.get("pad_to_multiple_of"))
        if any(number is not None and number < 0 for number in numbers):
            return False  # refused there, and so is another side
        if options.get("padding_side") not in (None, "left", "right"):
            return False
        if "token_type_ids" in self.model_input_names:
            return False
        if options.get("add_special_tokens", True) and self.num_special_tokens_to_add():
            return False
        split = options.get("split_special_tokens")
        split = self.split_special_tokens if split is None else split
        added = [token for token, special in self._added if not (special and split)]
        if len(added) > _MANY_ADDED:
            return False
        return all(isinstance(text, str) and suits_tiktoken(text, added) for text in texts)

    def _truncated(self, rows: list[list[int]], options: dict[str, Any]) -> list[list[int]]:
        strategy = options.get("truncation_strategy", TruncationStrategy.DO_NOT_TRUNCATE)
        limit = options.get("max_length")
        if strategy == TruncationStrategy.DO_NOT_TRUNCATE or limit is None:
            return rows
        if self.truncation_side == "right":
            return [ids[:limit] for ids in rows]
        return [ids[max(0, len(ids) - limit) :] for ids in rows]

    def _width(self, rows: list[list[int]], options: dict[str, Any]) -> int:
        """The length to pad to, 0 for none."""
        strategy = options.get("padding_strategy", PaddingStrategy.DO_NOT_PAD)
        if strategy == PaddingStrategy.DO_NOT_PAD:
            return 0
        is_longest = strategy == PaddingStrategy.LONGEST
        width = max(map(len, rows)) if is_longest else options["max_length"]
        return width + -width % (options.get("pad_to_multiple_of") or 1)

    def _padded(self, rows: list[list[int]], options: dict[str, Any]) -> dict[str, list[list[int]]]:
        """Ids and attention masks, padded as `options` say."""
        masks = [[1] * len(ids) for ids in rows]
        if width := self._width(rows, options):
            left = (options.get("padding_side") or self.padding_side) == "left"
            for columns, filling in ((rows, self.pad_token_id), (masks, 0)):
                for number, row in enumerate(columns):
                    missing = [filling] * (width - len(row))
                    columns[number] = missing + row if left else row + missing
        return {"input_ids": rows, "attention_mask": masks}

    def _encode_ordinary(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of plain texts."""
        workers = os.cpu_count() or 1
        if len(texts) > 1 and workers > 1 and sum(map(len, texts)) > _LARGE_BATCH:
            rows = self._tiktoken.encode_ordinary_batch(list(texts), num_threads=workers)
        else:
            rows = [self._tiktoken.encode_ordinary(text) for text in texts]
        if self._id_of_rank is None:
            return rows
        return [[self._id_of_rank[rank] for rank in ranks] for ranks in rows]

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        count = super()._add_tokens(new_tokens, special_tokens)
        self._added = self._added_tokens()
        return count

    def _added_tokens(self) -> list[tuple[str, bool]]:
        """Added tokens, and whether they are special; kept, as asking for them takes time."""
        decoder = self._tokenizer.get_added_tokens_decoder()
        return [(token.content, token.special) for token in decoder.values()]

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
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        vocab_path = Path(save_directory) / f"{prefix}vocab.json"
        merges_path = Path(save_directory) / f"{prefix}merges.txt"
        vocab = json.dumps(self._vocabulary.ids, ensure_ascii=False)
        vocab_path.write_text(vocab, encoding="utf-8")
        merges = ["#version: 0.2", *map(" ".join, self._vocabulary.merges), ""]
        merges_path.write_text("\n".join(merges), encoding="utf-8", newline="\n")
        return str(vocab_path), str(merges_path)


def _take_settings(described: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Add what a `tokenizer.json` says beyond its vocabulary to the arguments of `__init__`."""
    if not kwargs.get("added_tokens_decoder"):
        added = [dict(token) for token in described["added_tokens"]]
        kwargs["added_tokens_decoder"] = {token.pop("id"): AddedToken(**token) for token in added}
    processor = described.get("post_processor")
    if processor is not None and not kwargs.keys() & {"add_bos_token", "add_eos_token"}:
        bare = {"type": "BPE", "vocab": {}, "merges": []}
        carrier = {"version": "1.0", "model": bare, "post_processor": processor}
        kwargs.setdefault("post_processor", Tokenizer.from_str(json.dumps(carrier)).post_processor)


ScratchGPTTokenizer.register_for_auto_class("AutoTokenizer")
