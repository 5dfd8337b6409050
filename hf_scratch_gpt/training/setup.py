"""What a training begins with: a tokenizer, a model or its configuration, the arguments."""

import copy
import difflib
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from ..model.configuration_scratch_gpt import ScratchGPTConfig
from ..model.modeling_scratch_gpt import ScratchGPTForCausalLM
from ..model.presets_scratch_gpt import PRESET_ALIASES, PRESETS
from ..model.tokenization_scratch_gpt import ScratchGPTTokenizer
from .adapters import base_of, is_adapter, merged
from .corpus import vocabulary_size

Model: TypeAlias = str | os.PathLike[str] | ScratchGPTConfig | PreTrainedModel
Tokenizer: TypeAlias = str | os.PathLike[str] | PreTrainedTokenizerBase


class Preset(str):
    """The name of a published size, whatever folder has the same name."""


# Where ours differ from those of TrainingArguments. Decay, beta and clipping are GPT-3's (Brown et
# al. 2020, appendix B); a number of steps below 1 is a part of the whole training.
DEFAULTS: dict[str, Any] = dict(
    lr_scheduler_type="cosine",
    warmup_steps=0.02,
    weight_decay=0.1,
    adam_beta2=0.95,
    max_grad_norm=1.0,
    logging_steps=10,
    logging_first_step=True,
    eval_steps=0.1,
    save_steps=0.1,
    save_total_limit=2,
    ddp_find_unused_parameters=False,  # all are used, and the search takes time
)


# Numbers that transformers takes without a look: the least and the most that each may be.
_RANGES: dict[str, tuple[float, float]] = {
    "num_train_epochs": (1e-6, 1e6),
    "max_steps": (1, 1e9),
    "per_device_train_batch_size": (1, 2**20),
    "per_device_eval_batch_size": (1, 2**20),
    "gradient_accumulation_steps": (1, 2**20),
    "learning_rate": (0, 1e3),
    "weight_decay": (0, 1e3),
    "seed": (0, 2**32 - 1),
}

# The sizes of a model of which nothing is said, which two cores train in minutes.
SMALL: dict[str, int] = dict(
    num_hidden_layers=4, num_attention_heads=4, hidden_size=128, max_position_embeddings=128
)


def check_installed() -> None:
    """Raise an ImportError that says what to install, if a package is missing."""
    for name in ("accelerate", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"training needs {name}; pip install 'hf_scratch_gpt[train]'")


def checked_block_size(block_size: int | None, config: PretrainedConfig) -> int:
    """Tokens in a block: as many as the model has positions if `block_size` is not given."""
    positions = config.max_position_embeddings
    if block_size is not None and block_size > positions:
        raise ValueError(
            f"block_size={block_size} exceeds the model's {positions} positions; give {positions} "
            "or less"
        )
    return positions if block_size is None else block_size


def is_saved(model: Model) -> bool:
    """Whether `model` is the folder or hub id of a saved model, and not the name of a preset."""
    if isinstance(model, Preset):
        return False
    if isinstance(model, str):
        return "/" in model or Path(model, "config.json").is_file() or is_adapter(model)
    return isinstance(model, os.PathLike)


def has_tokenizer(model: Model) -> bool:
    """Whether `model` is a saved one, with a tokenizer beside it; an unknown preset is an error."""
    if isinstance(model, str) and not is_saved(model):
        ScratchGPTConfig.from_preset(model)
    return is_saved(model) or isinstance(model, PreTrainedModel)


def pretrained(name: str) -> str | Path:
    """Where the pretrained weights called `name` are: a folder, or a hub id.

    Args:
        name: a folder, "owner/name", or a published size of GPT-2, such as "gpt2" or "124M".

    Raises:
        ValueError: it is none of these.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    size = PRESET_ALIASES.get(name, name)
    if size in PRESETS and size.startswith("gpt2"):
        return f"openai-community/{size}"
    if "/" in name and not name.startswith((".", "/", "~")):
        return name
    raise ValueError(
        f"{name!r} is not a folder, not owner/name on the Hub, and not a published size of GPT-2 "
        "(gpt2, gpt2-medium, gpt2-large, gpt2-xl)"
    )


def load_tokenizer(tokenizer: Tokenizer | None, model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer; that of the saved `model` if not given."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    if tokenizer is None and isinstance(model, PreTrainedModel):
        tokenizer = model.name_or_path
    elif tokenizer is None and is_saved(model):
        tokenizer = model
    if not tokenizer:
        raise ValueError("the model was not loaded from a folder; give tokenizer= as well")
    path = Path(tokenizer)
    # A vocabulary in another layout than transformers', see ScratchGPTTokenizer.
    is_bare = path.exists() and not any(
        (path / name).is_file() for name in ("tokenizer_config.json", "config.json")
    )
    loader = ScratchGPTTokenizer if is_bare else AutoTokenizer
    with _loading("tokenizer", tokenizer):
        return loader.from_pretrained(os.fspath(tokenizer))


def load_model(place: str | os.PathLike[str], dtype: Any = torch.float32) -> PreTrainedModel:
    """The model in a folder or of a hub id; a GPT-2 in transformers' format is converted."""
    place = os.fspath(place)
    if is_adapter(place):
        with _loading("adapter", place):
            return merged(load_model(base_of(place), dtype), place)
    with _loading("model", place):
        is_gpt2 = PretrainedConfig.get_config_dict(place)[0].get("model_type") == "gpt2"
        loader = ScratchGPTForCausalLM if is_gpt2 else AutoModelForCausalLM
        return loader.from_pretrained(place, dtype=dtype)


@contextmanager
def _loading(what: str, place: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the tokenizers library raises no other class
        reason = str(error).strip().partition("\n")[0]
        if isinstance(error, (AttributeError, LookupError, TypeError)):  # in Python's own words
            reason = "one of its files does not have the content that its reader expects"
        message = f"the {what} {os.fspath(place)!r} cannot be loaded: {reason}"
        raise ValueError(message) from None


def load_start(
    model: Model, tokenizer: PreTrainedTokenizerBase, overrides: Mapping[str, Any] | None
) -> tuple[PretrainedConfig, PreTrainedModel | None]:
    """The configuration and, if its weights are not fresh, the model; see `train`."""
    needed, trained = vocabulary_size(tokenizer), None
    if isinstance(model, str) and not is_saved(model):
        config = ScratchGPTConfig.from_preset(model, **(overrides or {}))
        if not {"vocab_size", "n_vocab"} & {*(overrides or {})}:
            config.vocab_size = min(config.vocab_size, needed)
    elif overrides:
        raise ValueError(f"overrides={dict(overrides)} need a preset; change the configuration")
    elif isinstance(model, ScratchGPTConfig):
        config = copy.deepcopy(model)
    else:
        trained = model if isinstance(model, PreTrainedModel) else load_model(model)
        config = trained.config
    if needed > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {needed} tokens, the model {config.vocab_size}; give the tokenizer "
            f"that the model was made with, or a model with vocab_size={needed}"
        )
    if trained is None:
        end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, end
        config.pad_token_id = end if padding is None else padding
    return config, trained


def make_arguments(
    output_dir: str | os.PathLike[str],
    is_fresh: bool,
    validates: bool,
    given: Mapping[str, Any],
) -> TrainingArguments:
    """`given`, after a look at its numbers, over our defaults over those of `TrainingArguments`."""
    if given.get("resume_from_checkpoint") is not None:
        raise ValueError(
            "resume_from_checkpoint is not needed: the same call goes on from the last"
        )
    for name, (least, most) in _RANGES.items():
        value = given.get(name)
        if (name, value) == ("max_steps", -1):  # as many as the epochs have
            continue
        if value is not None and not least <= value <= most:
            raise ValueError(
                f"{name}={value} is not between {least:g} and {most:,.0f}; give another"
            )
    defaults = {**DEFAULTS, "eval_strategy": "steps" if validates else "no"}
    if is_fresh:
        # GPT-3's for its smallest model (table 2.1); a trained model goes on at the slower rate of
        # TrainingArguments.
        defaults["learning_rate"] = 6e-4
    if importlib.util.find_spec("tensorboard") is not None:
        defaults["report_to"] = "tensorboard"
    # Without it, each process that torchrun starts on CPUs would train by itself.
    defaults["use_cpu"] = not torch.accelerator.is_available()
    # For `RunningLoss`; the Trainer would join the results of all batches anew for each batch.
    loop = dict(batch_eval_metrics=True, eval_do_concat_batches=False)
    return TrainingArguments(output_dir=os.fspath(output_dir), **{**defaults, **given, **loop})


def on_first_process(arguments: TrainingArguments, work: Callable[[], Any]) -> Any:
    """The result of `work` in the first process, or its ValueError, in all processes."""
    from accelerate.utils import (  # type: ignore[import-untyped]  # it has no stubs
        broadcast_object_list,
    )

    outcome: list[Any] = [None]
    if arguments.process_index == 0:
        try:
            outcome = [work()]
        except ValueError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], ValueError):
        raise outcome[0]
    return outcome[0]


def resolve_steps(trainer: Trainer) -> int:
    """Turn parts of the whole training into numbers of steps; return how many steps it has.

    The Trainer does it too, but warns of its own numbers when it goes on from a checkpoint.
    """
    arguments = trainer.args
    *_, total = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())
    for name in ("logging_steps", "eval_steps", "save_steps"):
        if 0 < (getattr(arguments, name) or 0) < 1:
            setattr(arguments, name, math.ceil(getattr(arguments, name) * total))
    return total


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(re.sub(r"^argument (--\w+/)?", "", message))  # the name with underscores


def parse_flags(flags: Sequence[str]) -> dict[str, Any]:
    """Turn flags of a command line, such as `--learning-rate 1e-3`, into arguments of `train`.

    Raises:
        ValueError: as `part_words`, or there are words beside the flags.
    """
    words, arguments = part_words(flags)
    if words:
        raise ValueError(f"{words[0]} is not an argument of training")
    return arguments


def part_words(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Part the words of a command line into sources and arguments of `train`.

    Args:
        words: sources, and among them flags such as `--learning-rate 1e-3` for any of the fields of
            `TrainingArguments`, as its own command line takes them.

    Raises:
        ValueError: a flag does not exist, or its value does not fit.
    """
    parser = _Parser(TrainingArguments, allow_abbrev=False, add_help=False)
    names = {field.name for field in fields(TrainingArguments)}
    absent = object()
    parser.set_defaults(**dict.fromkeys(names, absent))
    given, sources = parser.parse_known_args(list(words))
    unknown = [word for word in sources if word.startswith("-")]
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0].replace("-", "_")
        nearest = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean --{nearest[0].replace('_', '-')}?" if nearest else ""
        raise ValueError(f"{unknown[0]} is not an argument of training{hint}")
    return sources, {name: value for name, value in vars(given).items() if value is not absent}
