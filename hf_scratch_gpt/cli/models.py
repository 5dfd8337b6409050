"""The model that a command is given, ready to be used."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints.saved import check_model
from ..engine.swap import optimize_for_generation
from ..files import without_progress_bars
from ..training.setup import load_model, load_tokenizer


def load(
    place: str, fast: bool = False, weights: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer in a folder or of a hub id, on the accelerator if there is one.

    Args:
        fast: optimize the model for generation.
        weights: do so with its weights in this format; see `optimize_for_generation`.
    """
    check_model(place)
    with without_progress_bars():
        model, tokenizer = load_model(place, dtype="auto"), load_tokenizer(None, place)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    if fast or weights:
        optimize_for_generation(model, weights)
    return model, tokenizer
