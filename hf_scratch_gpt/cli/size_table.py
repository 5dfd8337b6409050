"""Sizes and costs of models, looked up by name and laid out side by side."""

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import PretrainedConfig

from .. import sizing
from ..model.configuration_scratch_gpt import ScratchGPTConfig

Summary = dict[str, dict[str, float]]
Row = tuple[str, str, list[str]]

_NAME_WIDTH = 16  # as wide as GPT-3's number of parameters

# The parts of a summary: what the table calls them, and the units of their numbers.
_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_FLOPS = {"FLOP": 1, "MFLOP": 10**6, "GFLOP": 10**9, "TFLOP": 10**12}
_PARTS = {
    "parameters": ("Parameters", {"": 1}),
    "storage_bytes": ("Storage", _BYTES),
    "kv_cache_bytes_per_token": ("Key-value cache, a token", _BYTES),
    "kv_cache_bytes_full_context": ("Key-value cache, in full", _BYTES),
    "flops_per_token": ("FLOPs of a token", _FLOPS),
    "training_step": ("Step of training", {"": 1}),
    "training_memory_bytes": ("Memory: AdamW, float32", _BYTES),
    "training_seconds": ("Time to train", {"": 1}),
}


def find_config(name: str) -> ScratchGPTConfig:
    """The configuration of a preset, of a model's folder, or of a model on the Hub, "owner/name".

    Raises:
        ValueError: `name` is none of these; the error names the nearest presets. Or the model is
            neither ours nor a GPT-2, or its configuration is not valid.
        OSError: the folder's `config.json` cannot be read.
    """
    folder = Path(name).expanduser()
    try:
        return ScratchGPTConfig.from_preset(name)
    except ValueError as error:
        # A name without an owner is a preset mistyped, and is not looked for on the Hub.
        if not folder.is_dir() and "/" not in name:
            raise ValueError(f"{error} There is no such folder either") from None
    if not folder.is_dir() and name.startswith((".", "/", "~")):
        raise ValueError(f"there is no folder {name}")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json; give the folder of a saved model")
    source: str | Path = folder if folder.is_dir() else name
    try:
        fields, _ = PretrainedConfig.get_config_dict(source)
    except OSError as error:
        if isinstance(source, Path):
            raise
        raise ValueError(
            f"there is no folder {name}, and no such model was found on the Hugging Face Hub"
        ) from error
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind not in (ScratchGPTConfig.model_type, "gpt2"):
        raise ValueError(
            f"{name} is a model of type {kind!r}; give one of type 'scratch_gpt' or 'gpt2'"
        )
    try:
        return ScratchGPTConfig.from_pretrained(source)
    except StrictDataclassError as error:
        raise ValueError(f"the configuration of {name} is not valid: {error}") from error


def summarize(
    config: ScratchGPTConfig,
    batch_size: int = 1,
    length: int | None = None,
    tokens: float | None = None,
    flops_per_second: float | None = None,
) -> Summary:
    """What `sizing` computes for a configuration, part by part, in plain numbers.

    Args:
        batch_size: texts in a step of training.
        length: tokens of a text in training; the model's positions if not given.
        tokens, flops_per_second: what to train on and how fast, for the seconds that it takes.

    Raises:
        ValueError: a number is out of its range.
    """
    counts = sizing.count_parameters(config)
    positions = config.max_position_embeddings
    memory = sizing.training_memory(config, batch_size, length)
    checkpointed = sizing.training_memory(config, batch_size, length, checkpointing=True)
    training = sizing.training_flops_per_token(config, length)
    by_6n = sizing.rule_of_thumb_flops_per_token(config)
    totals = {"total": counts.total, "total_if_tied": counts.tied_total}
    floats = ("float32", "bfloat16")
    summary: Summary = {
        "parameters": {**vars(counts), **totals, "total_if_untied": counts.untied_total},
        "storage_bytes": {
            dtype: sizing.storage_bytes(counts.total, dtype) for dtype in (*floats, "int8")
        },
        "kv_cache_bytes_per_token": {
            dtype: sizing.kv_cache_bytes(config, 1, dtype) for dtype in floats
        },
        "kv_cache_bytes_full_context": {
            dtype: sizing.kv_cache_bytes(config, positions, dtype) for dtype in floats
        },
        "flops_per_token": {
            "forward": sizing.forward_flops_per_token(config, length),
            "training": training,
            "training_by_6N": by_6n,
        },
        "training_step": {"texts": batch_size, "tokens_of_a_text": length or positions},
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
    rows = list(_rows(list(summaries.values())))
    edge = sum(max(len(row[column]) for row in rows) + 2 for column in (0, 1))
    shown: dict[int, str] = {}
    room = console.width - edge
    for i, name in enumerate(summaries):
        width = max(min(len(name), _NAME_WIDTH), *(len(row[2][i]) for row in rows if row[2])) + 2
        if shown and width > room:
            console.print(_table(rows, shown), "")
            shown, room = {}, console.width - edge
        shown[i] = name
        room -= width
    console.print(_table(rows, shown))


def _table(rows: list[Row], shown: dict[int, str]) -> Table:
    """A table of some summaries; `shown` maps their places in `rows` to their names."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column()
    table.add_column()
    for name in shown.values():
        table.add_column(name, justify="right", overflow="fold", max_width=_NAME_WIDTH)
    for label, unit, cells in rows:
        table.add_row(
            label, unit, *(cells[i] for i in shown if cells), style="" if cells else "bold"
        )
    return table


def _rows(summaries: list[Summary]) -> Iterator[Row]:
    """Label, unit and a number for each summary; a heading has no numbers.

    A part's unit is the largest in which none of its numbers is below 1.
    """
    for part, (heading, units) in _PARTS.items():
        if part not in summaries[0]:
            continue
        yield heading, "", []
        smallest = min(number for summary in summaries for number in summary[part].values())
        fitting = [unit for unit in units if units[unit] <= smallest]
        unit = fitting[-1] if fitting else next(iter(units))
        decimals = 0 if units[unit] == 1 else 1
        for key in summaries[0][part]:
            numbers = [summary[part][key] for summary in summaries]
            if part == "training_seconds":
                cells = [sizing.humanize_seconds(seconds) for seconds in numbers]
            else:
                cells = [f"{number / units[unit]:,.{decimals}f}" for number in numbers]
            yield f"  {key.replace('_', ' ')}", unit, cells
