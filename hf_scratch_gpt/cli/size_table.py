"""Sizes and costs of models, looked up by name and laid out side by side."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from .. import sizing
from ..messages import printable
from ..model.presets_scratch_gpt import PRESET_ALIASES, PRESETS

if TYPE_CHECKING:
    from ..model.configuration_scratch_gpt import ScratchGPTConfig

Summary = dict[str, dict[str, float]]

_NAME_WIDTH = 16  # as wide as GPT-3's number of parameters

_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_FLOPS = {"": 1, "M": 10**6, "G": 10**9, "T": 10**12}
_COUNT = {"": 1}
# What the table shows of the parts of a summary: title, units, and its numbers with their labels.
_ROWS: dict[str, tuple[str, dict[str, int], dict[str, str]]] = {
    "parameters": (
        "parameters",
        _COUNT,
        {
            "token_embedding": "token embedding",
            "position_embedding": "position embedding",
            "attention": "attention",
            "feed_forward": "feed forward",
            "norms": "norms",
            "output_head": "output head",
            "total": "total",
            "total_if_tied": "total if tied",
            "total_if_untied": "total if untied",
        },
    ),
    "storage_bytes": ("storage", _BYTES, {name: name for name in ("float32", "bfloat16", "int8")}),
    "kv_cache_bytes_per_token": ("cache", _BYTES, {"float32": "of a token"}),
    "kv_cache_bytes_full_context": ("", _BYTES, {"float32": "in full"}),
    "flops_per_token": ("FLOPs", _FLOPS, {"forward": "a token", "training": "in training"}),
    "training_step": ("training", _COUNT, {"tokens": "tokens of a step"}),
    "training_memory_bytes": (
        "by AdamW",
        _BYTES,
        {
            "weights": "weights",
            "activations": "activations",
            "peak": "peak",
            "peak_if_checkpointed": "  if checkpointed",
        },
    ),
    "training_seconds": ("time", _COUNT, {"by_training_flops": "by FLOPs", "by_6N": "by 6N"}),
}


def find_config(name: str, overrides: Mapping[str, Any] | None = None) -> "ScratchGPTConfig":
    """The configuration of a preset, of a model's folder, or of a model on the Hub, "owner/name".

    Args:
        overrides: fields that differ from it.

    Raises:
        ValueError: `name` is none of these, the model is not a valid one of ours or a GPT-2, or
            the overrides do not fit.
        OSError: the folder's `config.json` cannot be read.
    """
    folder = Path(name).expanduser()
    if folder.is_file():
        raise ValueError(f"{name} is a file; give the folder of a saved model")
    # A name without an owner is a preset mistyped, and is not looked for on the Hub.
    if name in PRESETS | PRESET_ALIASES or not name or not (folder.is_dir() or "/" in name):
        return sizing.preset_sizes(name, **(overrides or {}))
    config = _find_saved(name, folder)
    config.update(dict(overrides or {}))
    config.check()
    return config


def _find_saved(name: str, folder: Path) -> "ScratchGPTConfig":
    """The configuration of the model in `folder`, or of the one that the Hub calls `name`."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import PretrainedConfig

    from ..checkpoints.folders import check_texts, read_config
    from ..model.configuration_scratch_gpt import ScratchGPTConfig

    source = str(folder) if folder.is_dir() else name
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json; give the folder of a saved model")
    if folder.is_dir():
        check_texts(folder)
    try:
        fields, _ = PretrainedConfig.get_config_dict(source)
    except OSError as error:
        if folder.is_dir():
            raise
        raise ValueError(
            f"there is no folder {name}, and no such model was found on the Hugging Face Hub"
        ) from error
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind not in (ScratchGPTConfig.model_type, "gpt2"):
        raise ValueError(
            f"{name} is a model of type {kind!r}; give one of type 'scratch_gpt' or 'gpt2'"
        )
    if folder.is_dir():
        return read_config(folder)
    try:
        return ScratchGPTConfig.from_pretrained(source)
    except StrictDataclassError as error:
        raise ValueError(f"the configuration of {name} is not valid: {error}") from error


def summarize(
    config: "ScratchGPTConfig",
    batch_size: int = 1,
    length: int | None = None,
    tokens: float | None = None,
    flops_per_second: float | None = None,
) -> Summary:
    """What `sizing` computes for a configuration, part by part, in plain numbers.

    A step of training has `batch_size` texts of `length` tokens; training on `tokens` takes seconds
    if `flops_per_second` are given as well.
    """
    counts = sizing.count_parameters(config)
    positions = config.max_position_embeddings
    memory = sizing.training_memory(config, batch_size, length)
    checkpointed = sizing.training_memory(config, batch_size, length, checkpointing=True)
    training = sizing.training_flops_per_token(config, length)
    by_6n = sizing.rule_of_thumb_flops_per_token(config)
    totals = {"total": counts.total, "total_if_tied": counts.tied_total}
    floats = ("float32", "bfloat16")

    def cache_bytes(length: int) -> dict[str, float]:
        return {dtype: sizing.kv_cache_bytes(config, length, dtype) for dtype in floats}

    summary: Summary = {
        "parameters": {**vars(counts), **totals, "total_if_untied": counts.untied_total},
        "storage_bytes": {
            dtype: sizing.storage_bytes(counts.total, dtype) for dtype in (*floats, "int8")
        },
        "kv_cache_bytes_per_token": cache_bytes(1),
        "kv_cache_bytes_full_context": cache_bytes(positions),
        "flops_per_token": {
            "forward": sizing.forward_flops_per_token(config, length),
            "training": training,
            "training_by_6N": by_6n,
        },
        "training_step": {
            "texts": batch_size,
            "tokens_of_a_text": length or positions,
            "tokens": batch_size * (length or positions),
        },
        "training_memory_bytes": {**vars(memory), "peak_if_checkpointed": checkpointed.peak},
    }
    if tokens is not None and flops_per_second is not None:
        summary["training_seconds"] = {
            name: sizing.training_seconds(flops, tokens, flops_per_second)
            for name, flops in (("by_training_flops", training), ("by_6N", by_6n))
        }
    return summary


def show(console: Console, summaries: dict[str, Summary]) -> None:
    """Print summaries side by side, in as many tables as the console's width asks for."""
    names, unlimited = [*summaries], console.options.update(width=sys.maxsize)
    for count in range(len(names), 0, -1):
        table = _table({name: summaries[name] for name in names[:count]})
        if console.measure(table, options=unlimited).maximum <= console.width:
            break
    console.print(table)
    if names[count:]:
        console.print()
        show(console, {name: summaries[name] for name in names[count:]})


def _table(summaries: dict[str, Summary]) -> Table:
    """A row of numbers for each entry; a part's name stands in its first row.

    A part's unit is the largest in which none of its numbers is below 1.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for _ in range(3):
        table.add_column()
    for name in summaries:
        table.add_column(printable(name), justify="right", overflow="fold", max_width=_NAME_WIDTH)
    for part in next(iter(summaries.values())):
        title, units, labels = _ROWS[part]
        columns = [summary[part] for summary in summaries.values()]
        labels = {key: label for key, label in labels.items() if _tells(key, columns)}
        smallest = min(column[key] for column in columns for key in labels)
        unit, size = [each for each in units.items() if each[1] <= max(1, smallest)][-1]
        for key, label in labels.items():
            if part == "training_seconds":
                cells = [sizing.humanize_seconds(column[key]) for column in columns]
            else:
                cells = [f"{column[key] / size:,.{0 if size == 1 else 2}f}" for column in columns]
            table.add_row(title, label, unit, *cells)
            title = ""
    return table


def _tells(key: str, columns: list[dict[str, float]]) -> bool:
    """Whether a number is neither 0 nor the total again, in one of the columns at least."""
    return any(c[key] not in (0, key.startswith("total_if") and c["total"]) for c in columns)
