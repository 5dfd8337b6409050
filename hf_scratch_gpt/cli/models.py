"""The model that a command is given, ready to be used."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import typer
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints.saved import check_model
from ..engine.compiling import can_compile
from ..engine.swap import optimize_for_generation
from ..files import without_progress_bars
from ..training.setup import load_model, load_tokenizer


def load(
    place: str, fast: bool | None = False, weights: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer in a folder or of a hub id, on the accelerator if there is one.

    Args:
        fast: optimize the model for generation; None does so on a CPU, if that is possible.
        weights: optimize it with its weights in this format; see `optimize_for_generation`.
    """
    check_model(place)
    with _told_of_a_missing_folder(place), without_progress_bars():
        model, tokenizer = load_model(place, dtype="auto"), load_tokenizer(None, place)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    if fast or weights:
        optimize_for_generation(model, weights)
    elif fast is None and model.device.type == "cpu":
        _optimize_if_possible(model)
    return model, tokenizer


@contextmanager
def _told_of_a_missing_folder(place: str) -> Iterator[None]:
    """Say first of what is not on the Hub that it is not a folder either."""
    try:
        yield
    except ValueError as error:
        if place and Path(place).is_dir():
            raise
        if Path(place).is_file():
            remedy = "give the folder of a saved model, or convert it first"
            raise ValueError(f"{place} is a file; {remedy}") from None
        remedy = f"and from the Hub {error}"
        try:
            validate_repo_id(place)
        except HFValidationError:
            remedy = "give the folder of a saved model, or owner/name on the Hub"
        raise ValueError(f"there is no folder {place!r}; {remedy}") from None


def _optimize_if_possible(model: PreTrainedModel) -> None:
    """Optimize `model`; say so where only a compiler is missing, or fails."""
    reason = "no C++ compiler is there, such as g++"
    try:
        if can_compile():
            optimize_for_generation(model)
            return
    except ValueError:  # it is not a model of ours, and the user has asked for nothing
        return
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
    typer.echo(f"note: writing by PyTorch alone, more slowly: {reason}", err=True)
