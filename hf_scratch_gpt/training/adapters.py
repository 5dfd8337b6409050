"""LoRA adapters, by PEFT: trained in place of all weights, saved alone, merged at load.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
"""

import importlib.util
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

_CONFIG = "adapter_config.json"
_FILES = (_CONFIG, "adapter_model.safetensors")
_ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj"]


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` holds an adapter for another model."""
    return Path(folder, _CONFIG).is_file()


def base_of(folder: str) -> str:
    """The folder or hub id of the model that the adapter in `folder` was trained for."""
    with _peft() as peft:
        return peft.PeftConfig.from_pretrained(folder).base_model_name_or_path


def merged(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """`model` with the adapter in `folder` added to its weights."""
    with _peft() as peft:
        return peft.PeftModel.from_pretrained(model, folder).merge_and_unload()


def with_adapter(model: PreTrainedModel, rank: int) -> Any:
    """`model` with an adapter, whose weights alone are trained.

    Raises:
        ValueError: `rank` is below 1.
        ImportError: PEFT is missing.
    """
    if rank < 1:
        raise ValueError(f"lora={rank} is not the rank of an adapter; give 1 or more")
    folder = Path(model.name_or_path)
    with _peft() as peft:
        adapter = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=_ADAPTED, task_type="CAUSAL_LM"
        )
        adapted = peft.get_peft_model(model, adapter)
    if folder.is_dir():  # the adapter may be loaded from any other
        adapter.base_model_name_or_path = str(folder.resolve())
    return adapted


def copy_adapter(source: str, folder: Path) -> None:
    """Copy the adapter in the folder `source` to `folder`."""
    for name in _FILES:
        shutil.copy(Path(source, name), folder)


@contextmanager
def _peft() -> Iterator[Any]:
    if importlib.util.find_spec("peft") is None:
        raise ImportError("an adapter needs peft; pip install peft")
    import peft

    with warnings.catch_warnings():
        # It asks a model by names that transformers has deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        yield peft
