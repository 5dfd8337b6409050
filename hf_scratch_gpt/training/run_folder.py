"""Which run an output folder holds, how far it has come, and whether another may go on in it."""

import hashlib
import json
import math
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerState,
    TrainingArguments,
)

from ..files import new_file, refuse_file
from .blocks import Blocks
from .corpus import fingerprint

RECORD = "run.json"
STATE = "trainer_state.json"
CURVE = "loss.png"
_CHECKPOINT = "checkpoint-"
_UNFINISHED = f"{RECORD}.unfinished"

_LENGTH = ("max_steps", "num_train_epochs")
_RHYTHM = ("logging_steps", "eval_steps", "save_steps")

# The arguments that decide the loss curve, apart from the batch size, to which several contribute.
_ARGUMENTS = (
    "seed", "data_seed", "max_steps", "num_train_epochs",
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "bf16", "fp16",
    "train_sampling_strategy", "dataloader_drop_last",
)  # fmt: skip


def batch_size(arguments: TrainingArguments) -> int:
    """Sequences in one step, over all processes and accumulation steps."""
    processes = arguments.world_size
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * processes


def describe(
    config: PretrainedConfig,
    trained: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    arguments: TrainingArguments,
    blocks: Blocks,
    held_out: Blocks | None,
    lora: int | None = None,
) -> dict[str, Any]:
    """All that decides the loss curve of a run, as plain values; `trained` is None if fresh."""
    # Only the fields of its own class, as transformers adds some to the base class now and then.
    names = type(config).__annotations__.keys() - PretrainedConfig.__annotations__.keys()
    given = arguments.to_dict()
    run = {
        "texts": blocks.file.digest,
        "tokens": blocks.file.tokens,
        "block_size": blocks.block_size,
        "training_blocks": len(blocks),
        "validation": held_out and [held_out.file.digest, len(held_out)],
        "tokenizer": fingerprint(tokenizer),
        "batch_size": batch_size(arguments),
        **{name: given[name] for name in _ARGUMENTS},
        "weights": "fresh" if trained is None else weights_digest(trained),
        **{f"model.{name}": getattr(config, name) for name in sorted(names)},
    }
    if run["max_steps"] > 0:
        del run["num_train_epochs"]
    if lora is not None:
        run["lora"] = lora
    return json.loads(json.dumps(run, default=str))


def weights_digest(model: nn.Module) -> str:
    """A hash of all weights of `model`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of the run in `folder`; None if new, a ValueError if it holds other files."""
    refuse_file(folder)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if isinstance(record, dict):
            return record
    except FileNotFoundError:
        if not folder.exists() or {path.name for path in folder.iterdir()} <= {_UNFINISHED}:
            return None
    except (OSError, ValueError):
        pass
    raise ValueError(
        f"{folder} holds files, but not a run ({RECORD}); choose another folder or empty it"
    )


def enter(folder: Path, run: dict[str, Any]) -> None:
    """Make `folder` that of `run`, or raise a ValueError that says how the run in it differs.

    The run in it may be a shorter one, which is then no longer finished.
    """
    record = read_record(folder)
    if record is None:
        folder.mkdir(parents=True, exist_ok=True)
    else:
        names = [name for name in record | run if record.get(name) != run.get(name)]
        if not names:
            return
        is_longer = names[0] in _LENGTH and run.get(names[0], 0) > record.get(names[0], math.inf)
        if len(names) > 1 or not is_longer:
            differences = (
                f"{name} {_short(record.get(name))} there, {_short(run.get(name))} here"
                for name in names
            )
            raise ValueError(
                f"{folder} holds another run ({'; '.join(differences)}); choose another folder, "
                "give the same again, or more steps or epochs, to go on with it, or delete it"
            )
        (folder / STATE).unlink(missing_ok=True)
    with new_file(folder / RECORD) as unfinished:
        unfinished.write_text(json.dumps(run, indent=2), encoding="utf-8")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 30 else f"{text[:12]}...{text[-5:]}"


@contextmanager
def withdrawn_on_error(folder: Path, is_new: bool) -> Iterator[None]:
    """Take back what `enter` has written of a new run if it cannot begin: another may be right."""
    try:
        yield
    except Exception:
        if is_new:
            (folder / RECORD).unlink(missing_ok=True)
        raise


def read_state(folder: Path) -> TrainerState | None:
    """The state of training in `folder`, which is written last; None if it is not complete."""
    try:
        return TrainerState.load_from_json(str(folder / STATE))
    except (OSError, ValueError, TypeError):
        return None


def take_rhythm(checkpoint: Path, arguments: TrainingArguments) -> None:
    """Write into `checkpoint` how often this run logs, validates and saves.

    A run that is lengthened does so less often, and the Trainer would warn of it.
    """
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    wanted = {name: getattr(arguments, name) for name in _RHYTHM}
    if state | wanted != state:
        with new_file(checkpoint / STATE) as unfinished:
            unfinished.write_text(json.dumps(state | wanted, indent=2), encoding="utf-8")


def is_at_end(state: TrainerState, run: dict[str, Any]) -> bool:
    """Whether no step of `run` is left after `state`."""
    if run["max_steps"] > 0:
        return state.global_step >= run["max_steps"]
    return (state.epoch or 0) >= run["num_train_epochs"]


def step_of(checkpoint: Path | None) -> int:
    """The step after which `checkpoint` was saved; 0 if there is none."""
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix(_CHECKPOINT))


def checkpoints(folder: Path, before: float = math.inf) -> list[Path]:
    """The checkpoints in `folder` of steps below `before`, the last first."""
    names = (path.name.removeprefix(_CHECKPOINT) for path in folder.glob(f"{_CHECKPOINT}*"))
    steps = sorted((int(name) for name in names if name.isdigit()), reverse=True)
    return [folder / f"{_CHECKPOINT}{step}" for step in steps if step < before]


def last_checkpoint(folder: Path, before: float = math.inf) -> Path | None:
    """The last of `checkpoints` that is complete."""
    return next(filter(_is_complete, checkpoints(folder, before)), None)


def discard_after(checkpoint: Path | None, folder: Path) -> None:
    """Delete the checkpoints of steps after `checkpoint`, which will be taken again.

    Where it is None, only those that are not complete are deleted.
    """
    for path in checkpoints(folder):
        if path == checkpoint:
            return
        if checkpoint is not None or read_state(path) is None:
            shutil.rmtree(path)


def _is_complete(checkpoint: Path) -> bool:
    # The first process writes the state last. Others may still be writing their random numbers, to
    # a zip archive, whose directory comes last.
    numbers = [*checkpoint.glob("rng_state*.pth")]
    is_alone = [path.name for path in numbers] == ["rng_state.pth"]
    return (
        read_state(checkpoint) is not None
        and (is_alone or len(numbers) > 1)
        and all(map(zipfile.is_zipfile, numbers))
    )
