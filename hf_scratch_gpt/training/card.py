"""The card of a trained model: its texts, its training and its losses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, TrainerState

from ..cards import name_of, write_card
from . import run_folder as runs

_ROWS = 10  # of the table of losses
_SIZES = [
    ("num_hidden_layers", "layers"),
    ("num_attention_heads", "heads"),
    ("hidden_size", "numbers for a token"),
    ("vocab_size", "tokens in the vocabulary"),
    ("max_position_embeddings", "positions"),
]


def describe_training(
    folder: Path,
    state: TrainerState,
    config: PretrainedConfig,
    texts: Sequence[str],
    base: str | None,
) -> None:
    """Write the card of the run in `folder`, whose model is saved.

    Args:
        state: as training left it.
        config: the model's.
        texts: the sources that were trained on, as `train` took them.
        base: the folder or hub id of the model that training began with; None for fresh weights.
    """
    run = runs.read_record(folder)
    assert run is not None, "a run enters its folder before it trains"
    began = "from nothing" if base is None else f"from `{name_of(base)}`"
    write_card(
        folder,
        f"Trained {began}",
        {
            "Data": _data(run, texts),
            "Training": _training(run, state, config),
            "Evaluation": _losses(state),
        },
        config,
        source=base,
    )


def _data(run: dict[str, Any], texts: Sequence[str]) -> str:
    names = ", ".join(f"`{name_of(text)}`" for text in texts)
    size, held_out = run["block_size"], run["validation"]
    validated = f", {held_out[1] * size:,} to validate on" if held_out else ""
    return (
        f"{names}: {run['tokens']:,} tokens, of which {run['training_blocks'] * size:,} to train on"
        f"{validated}, in blocks of {size:,}. A digest of their ids, and what decided the losses, "
        f"are in `{runs.RECORD}`."
    )


def _training(run: dict[str, Any], state: TrainerState, config: PretrainedConfig) -> str:
    adapter = f", an adapter of rank {run['lora']} alone" if "lora" in run else ""
    # Not every model has all of them.
    known = [f"{getattr(config, name):,} {what}" for name, what in _SIZES if hasattr(config, name)]
    return (
        f"{', '.join(known)}{adapter}. {state.global_step:,} steps of {run['batch_size']} blocks "
        f"by {run['optim']}, learning rate {run['learning_rate']:g} ({run['lr_scheduler_type']}), "
        f"seed {run['seed']}; transformers {transformers.__version__}, torch {torch.__version__}."
    )


def _losses(state: TrainerState) -> str:
    """A table of the last losses, in nats per token."""
    rows = [entry for entry in state.log_history if "eval_loss" in entry][-_ROWS:]
    if not rows:
        last = next((entry for entry in reversed(state.log_history) if "loss" in entry), None)
        told = "" if last is None else f" The last loss of training was {last['loss']:.3f} nats."
        return f"There was no validation.{told} `{runs.CURVE}` shows the curve."
    lines = [
        f"| {entry['step']:,} | {entry['eval_loss']:.3f} | {entry['eval_perplexity']:,.1f} |"
        for entry in rows
    ]
    head = ["| Step | Validation loss, nats per token | Perplexity |", "| ---: | ---: | ---: |"]
    return "\n".join([*head, *lines, "", f"`{runs.CURVE}` shows the curve."])
