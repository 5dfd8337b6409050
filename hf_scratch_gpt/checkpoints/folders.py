"""What a folder must be before transformers and other libraries read it: bounded, and of a kind."""

from contextlib import suppress
from os.path import lexists
from pathlib import Path
from typing import Any

from ..model.configuration_scratch_gpt import ScratchGPTConfig
from ..model.vocabulary_scratch_gpt import read_json, read_text
from .sources import told_as_error

_TEXT, _NUMBER = (str,), (int, float)
# Kinds of fields that transformers takes for granted; any may be null.
_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "config.json": {
        "architectures": (list,),
        "attn_implementation": _TEXT,
        "auto_map": (dict,),
        "dtype": _TEXT,
        "id2label": (dict,),
        "label2id": (dict,),
        "model_type": _TEXT,
        "per_layer_config": (dict,),
        "quantization_config": (dict,),
        "rope_scaling": (dict,),
        "torch_dtype": _TEXT,
    },
    "generation_config.json": {},
    "tokenizer_config.json": {
        "add_prefix_space": (bool,),
        "added_tokens_decoder": (dict,),
        "auto_map": (dict, list),
        "chat_template": (str, list, dict),
        "extra_special_tokens": (dict, list),
        "model_input_names": (list,),
        "model_max_length": _NUMBER,
        "tokenizer_class": _TEXT,
    },
    "special_tokens_map.json": {},
    "added_tokens.json": {},
    "tokenizer.json": {
        "added_tokens": (list,),
        "model": (dict,),
        **dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"), (dict,)),
        **dict.fromkeys(("truncation", "padding"), (dict,)),
    },
    "vocab.json": {},
}
_MOST_LABELS = 1 << 16


def check_texts(folder: Path) -> None:
    """Raise a ValueError that names a JSON file of `folder`, or a field, that is not as it should.

    Checked before anything reads them: that they are files, their sizes, and kinds of fields.
    """
    for name, kinds in _FIELDS.items():
        path = folder / name
        if not lexists(path):
            continue
        content = read_json(read_text(path), str(path))
        for field, allowed in kinds.items():
            _check(path, field, content.get(field), allowed)
        labels = content.get("num_labels") if name == "config.json" else None
        if labels is not None and not (type(labels) is int and 0 <= labels <= _MOST_LABELS):
            raise ValueError(f"{path}: num_labels is {labels!r}, not a number up to {_MOST_LABELS}")


def read_config(folder: Path) -> ScratchGPTConfig:
    """The configuration in `folder`; a ValueError names the file, and the field that is wrong."""
    path = folder / "config.json"
    with told_as_error(path):
        fields, _ = ScratchGPTConfig.get_config_dict(folder)
        try:
            return ScratchGPTConfig.from_dict(fields)
        except (AttributeError, LookupError, TypeError):
            wrong = [name for name in fields if _is_right({**fields, name: None})]
            raise ValueError(f"{' or '.join(wrong[:3]) or 'a field'} is of another kind") from None


def _is_right(fields: dict[str, Any]) -> bool:
    with suppress(Exception):
        ScratchGPTConfig.from_dict(fields)
        return True
    return False


def _check(path: Path, field: str, value: Any, allowed: tuple[type, ...]) -> None:
    is_flag = isinstance(value, bool) and bool not in allowed  # a bool is an int
    if value is not None and (not isinstance(value, allowed) or is_flag):
        kinds = " or ".join(kind.__name__ for kind in allowed)
        raise ValueError(f"{path}: {field} is a {type(value).__name__}; it should be a {kinds}")
