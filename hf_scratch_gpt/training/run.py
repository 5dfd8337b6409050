"""Train a GPT: texts -> packed blocks -> transformers' `Trainer`.

The same call runs in one process, and in each of several under `torchrun` or `accelerate launch`.
"""

import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from ..files import without_progress_bars
from ..model.modeling_scratch_gpt import ScratchGPTForCausalLM
from ..writing import encode
from . import adapters, setup
from . import run_folder as runs
from .blocks import Blocks
from .callbacks import (
    SampleText,
    draw_loss,
)
from .card import describe_training
from .corpus import tokenize
from .plan import TimeLeft, describe_plan, validation_limit
from .texts import Sources
from .trainer import make_trainer, run_to_end
from .vocabularies import gpt2_vocabulary, is_recipe, make_vocabulary

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """How a training went.

    Args:
        folder: where the model is; after an interruption it holds checkpoints only.
        steps: steps taken, those of earlier starts included.
        history: what was logged, in order: `loss`, `eval_loss` (nats per token), `eval_perplexity`,
            `learning_rate` and more, each with its `step`.
        interrupted: whether a signal ended it before its last step.
        went_on_from: the step that this start resumed from; `steps` if the run was finished.
    """

    folder: Path
    steps: int
    history: list[dict[str, float]]
    interrupted: bool
    went_on_from: int

    def last(self, name: str) -> float | None:
        """What was logged last as `name`, such as "eval_loss"; None if nothing was."""
        return next((entry[name] for entry in reversed(self.history) if name in entry), None)


def train(
    sources: Sources,
    output_dir: str | os.PathLike[str],
    *,
    model: setup.Model = "gpt2",
    overrides: Mapping[str, Any] | None = None,
    tokenizer: setup.Tokenizer | None = None,
    block_size: int | None = None,
    validation: float | Sources | None = 0.05,
    validation_tokens: int | None = None,
    text_field: str = "text",
    cache_dir: str | os.PathLike[str] | None = None,
    sample_prompt: str | None = None,
    sample_steps: float = 0.1,
    lora: int | None = None,
    merge_lora: bool = False,
    on_sample: Callable[[int, str], None] | None = None,
    on_notice: Callable[[str], None] = logger.info,
    progress: TrainerCallback | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **training_arguments: Any,
) -> TrainingResult:
    """Train a language model on texts and save it, with its tokenizer, in `output_dir`.

    Started again with the same arguments, it goes on from the last checkpoint, with the losses of
    an uninterrupted run; a finished run is left as it is, or goes on if more steps or epochs are
    asked for. Ctrl-C or SIGTERM ends it with a checkpoint. The folder also gets `loss.png`, a card
    (`README.md`) and, where tensorboard is installed, `runs`.

    Args:
        sources: texts to train on: files, folders or data sets, see `texts.find`.
        output_dir: a folder that is new or empty, or that of the same run.
        model: for fresh weights, the name of a preset or a configuration; else the folder or hub id
            of a saved model, or a model. A preset takes its special tokens from the tokenizer, and
            its number of tokens too, where that is smaller.
        overrides: fields of the configuration that differ from the preset's.
        tokenizer: a folder, hub id or tokenizer; or what `make_vocabulary` makes of the texts, by
            the names "char", "bpe" and "bpe:4096". If not given, that of the saved model; for fresh
            weights GPT-2's own, if it is in Hugging Face's cache, else "bpe".
        block_size: tokens in a training example; as many as the model has positions if not given.
        validation: which part of the blocks, from the end, to validate on; or other texts; or None.
        validation_tokens: validate on so many tokens of that at most, spread evenly over it. If not
            given, a million, and not many more than are trained on in between.
        text_field, cache_dir: see `tokenize`.
        sample_prompt: a text that the model continues every `sample_steps` steps (below 1: that
            part of all steps).
        lora: train an adapter of this rank (LoRA, Hu et al. 2021) for the query, key, value and
            output projections of a saved model, by PEFT, and save it alone.
        merge_lora: add the adapter to the weights at the end, and save the whole model.
        on_sample: is called with the step and the sample; if not given, it is logged.
        on_notice: is called with lines that say where token ids are, what is validated on, and what
            the training will take.
        progress: shows how training goes, in place of the progress bars of others.
        callbacks: more callbacks for the Trainer.
        training_arguments: those of `TrainingArguments`, over `setup.DEFAULTS`.

    Raises:
        ValueError: the sources, the sizes or the folder do not fit, or the training diverges.
        ImportError: a package is missing.
    """
    setup.check_installed()
    folder, lines = Path(output_dir), list[str]()
    texts = [*_listed(sources), *_listed(validation)]
    chosen = _choose_tokenizer(tokenizer, model, texts, text_field, cache_dir, lines.append)
    encoder = copy.copy(chosen)
    config, trained = setup.load_start(model, encoder, overrides)
    if lora is not None and trained is None:
        raise ValueError("LoRA adapts pretrained weights; give those of a saved model")
    if not sample_steps > 0:
        raise ValueError(f"sample_steps={sample_steps} is not above 0; give steps, or a part of 1")
    if merge_lora and lora is None:
        raise ValueError("merge_lora merges the adapter that lora trains; give both")
    encoder.model_max_length = min(encoder.model_max_length, config.max_position_embeddings)
    if sample_prompt:
        encode(encoder, sample_prompt)  # it may have characters that the vocabulary lacks
    size = setup.checked_block_size(block_size, config)
    arguments = setup.make_arguments(folder, trained is None, bool(validation), training_arguments)
    record = setup.on_first_process(arguments, lambda: runs.read_record(folder))
    blocks, held_out = Blocks(tokenize(sources, encoder, text_field, cache_dir), size), None
    if isinstance(validation, float | int):
        blocks, held_out = blocks.split(validation) if validation else (blocks, None)
    elif validation is not None:
        held_out = Blocks(tokenize(validation, encoder, text_field, cache_dir), size)
    notice = on_notice if arguments.process_index == 0 else logger.debug
    for line in lines:
        notice(line)
    if validation_tokens is None:
        validation_tokens = validation_limit(arguments, blocks, record)
    validates = arguments.eval_strategy != "no"
    held_out = _bounded(blocks, held_out, validation_tokens, notice, validates)
    run = runs.describe(config, trained, encoder, arguments, blocks, held_out, lora)
    names = [os.fspath(text) for text in _listed(sources)]
    base = None if trained is None else _name_of_base(model, trained)
    describe = partial(describe_training, folder, config=config, texts=names, base=base)
    state, checkpoint = setup.on_first_process(
        arguments, lambda: _enter(folder, run, arguments, merge_lora, describe)
    )
    if state is not None:
        steps = state.global_step
        return TrainingResult(folder, steps, state.log_history, False, went_on_from=steps)
    arguments.disable_tqdm |= progress is not None
    set_seed(arguments.seed)
    with runs.withdrawn_on_error(folder, record is None):
        model = ScratchGPTForCausalLM(config) if trained is None else trained
        if lora is not None:
            model, arguments.label_names = adapters.with_adapter(model, lora), ["labels"]
        trainer = make_trainer(model, encoder, arguments, blocks, held_out, callbacks)
        total = setup.resolve_steps(trainer)
    begun = runs.step_of(checkpoint)
    if checkpoint is not None:
        setup.on_first_process(arguments, lambda: runs.take_rhythm(checkpoint, arguments))
    notice(describe_plan(model, arguments, blocks, held_out, total, begun))
    trainer.add_callback(TimeLeft(notice))
    if sample_prompt is not None:
        every = max(1, math.ceil(sample_steps * (total if sample_steps < 1 else 1)))
        trainer.add_callback(SampleText(encoder, sample_prompt, every, on_sample))
    if progress is not None:
        trainer.remove_callback(PrinterCallback)  # which prints where bars are disabled
        trainer.add_callback(progress)
    with nullcontext() if progress is None else without_progress_bars():
        interrupted = run_to_end(trainer, checkpoint, merge_lora, describe)
    reached = trainer.state
    return TrainingResult(folder, reached.global_step, reached.log_history, interrupted, begun)


def _choose_tokenizer(
    tokenizer: setup.Tokenizer | None,
    model: setup.Model,
    texts: Sources,
    text_field: str,
    cache_dir: str | os.PathLike[str] | None,
    notice: Callable[[str], None],
) -> PreTrainedTokenizerBase:
    """The tokenizer that `train` is given, or the one for what it is given."""
    if tokenizer is None and not setup.has_tokenizer(model):
        tokenizer = gpt2_vocabulary() or "bpe"
    if isinstance(tokenizer, str) and is_recipe(tokenizer):
        return make_vocabulary(tokenizer, texts, text_field, cache_dir, notice)
    return setup.load_tokenizer(tokenizer, model)


def _listed(sources: float | Sources | None) -> Sequence[str | os.PathLike[str]]:
    """Texts, as a sequence of sources; none for a part of other texts."""
    if sources is None or isinstance(sources, float | int):
        return []
    return [sources] if isinstance(sources, str | os.PathLike) else sources


def _bounded(
    blocks: Blocks,
    held_out: Blocks | None,
    tokens: int,
    notice: Callable[[str], None],
    validates: bool,
) -> Blocks | None:
    """At most `tokens` tokens of `held_out`; say so, and where the ids of the texts are."""
    path, size = blocks.file.path, blocks.block_size
    notice(
        f"Token ids: {path.stat().st_size / 1e6:,.1f} MB in {path}, kept for trainings on the same "
        "texts; `hf-scratch-gpt clear-cache` removes them"
    )
    chosen = held_out and held_out.spread(tokens)
    if validates and chosen and held_out and len(chosen) < len(held_out):
        notice(
            f"Each validation takes {len(chosen) * size:,} of {len(held_out) * size:,} tokens, "
            "spread evenly"
        )
    return chosen


def _name_of_base(model: setup.Model, trained: PreTrainedModel) -> str | None:
    """The folder or hub id of the `trained` model that `model` names, or is."""
    name = os.fspath(model) if isinstance(model, str | os.PathLike) else trained.name_or_path
    return name or None


def _enter(
    folder: Path,
    run: dict[str, Any],
    arguments: TrainingArguments,
    merge_lora: bool,
    describe: Callable[[TrainerState], None],
) -> tuple[TrainerState | None, Path | None]:
    """Make `folder` that of `run`; the state of a finished run, or the checkpoint to go on from."""
    runs.enter(folder, run)
    state, checkpoint = runs.read_state(folder), runs.last_checkpoint(folder)
    if state is not None:
        return state, None
    reached = None if checkpoint is None else runs.read_state(checkpoint)
    if checkpoint is not None and reached is not None and runs.is_at_end(reached, run):
        # It was killed between its last step and the end; a Trainer would take one more step.
        if any(checkpoint.glob("*.safetensors")):
            return _finish(folder, checkpoint, reached, arguments, merge_lora, describe), None
        # Weights of FSDP, one part for each process.
        checkpoint = runs.last_checkpoint(folder, before=reached.global_step)
    runs.discard_after(checkpoint, folder)
    return None, checkpoint


def _finish(
    folder: Path,
    checkpoint: Path,
    reached: TrainerState,
    arguments: TrainingArguments,
    merge_lora: bool,
    describe: Callable[[TrainerState], None],
) -> TrainerState:
    """Do what is done at the end of training, with the last checkpoint."""
    best = reached.best_model_checkpoint if arguments.load_best_model_at_end else None
    place = best or str(checkpoint)
    if adapters.is_adapter(place) and not merge_lora:
        adapters.copy_adapter(place, folder)
    else:
        model = setup.load_model(place)
        model.config.use_cache = True
        model.save_pretrained(folder)
    setup.load_tokenizer(None, place).save_pretrained(folder)
    draw_loss(reached.log_history, folder / runs.CURVE)
    describe(reached)
    reached.save_to_json(str(folder / runs.STATE))
    return reached
