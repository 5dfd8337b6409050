"""transformers' `Trainer` as `train` uses it: its parts, its run, and what is saved in the end."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils import logging

from ..model.modeling_scratch_gpt import ScratchGPTForCausalLM
from . import run_folder as runs
from .blocks import Blocks, ShuffledOrder, whole_batches
from .callbacks import KeepFolder, RunningLoss, StopOnSignal, losses_of_rows

logger = logging.get_logger(__name__)

_LOGITS = 2**22  # that are in memory at a time when a model is evaluated


class _Trainer(Trainer):
    """Takes blocks in the order that accelerate would, and less memory for logits.

    A training that has diverged is an error, and its weights are not saved.
    """

    by_engine = False

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own; in pieces where the engine, which has a quick loop for it, trains."""
        if not self.by_engine:
            return super().compute_loss(*args, **kwargs)
        config = self.model.config
        kept, config.chunked_loss = config.chunked_loss, True  # it is not saved so
        try:
            return super().compute_loss(*args, **kwargs)
        finally:
            config.chunked_loss = kept

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not self.args.fp16:  # whose scaler leaves out the steps that overflow
            self._refuse_divergence("loss", loss)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        self._refuse_divergence("validation loss", torch.tensor(metrics["eval_loss"]))
        return metrics

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        if not self.is_fsdp_enabled:  # where each process has a part of them
            for name, parameter in self.model.named_parameters():
                self._refuse_divergence(name, parameter.detach())
        super().save_model(*args, **kwargs)

    def _refuse_divergence(self, name: str, numbers: torch.Tensor) -> None:
        if not numbers.isfinite().all():
            raise ValueError(
                f"{name} is NaN or infinite after {self.state.global_step} steps: the training has "
                f"diverged; lower learning_rate={self.args.learning_rate:g} and choose another "
                "folder"
            )

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Losses of rows in place of logits, of a few rows at a time."""
        ids, labels = inputs["input_ids"], inputs["labels"]
        rows = max(1, _LOGITS // (ids.shape[1] * self.model.config.vocab_size))
        losses = []
        for part, targets in zip(ids.split(rows), labels.split(rows), strict=True):
            # With labels the model would compute the loss too.
            _, logits, _ = super().prediction_step(model, {"input_ids": part}, *args, **kwargs)
            losses.append(losses_of_rows(logits, targets.to(logits.device)))
        return None, torch.cat(losses), labels

    def get_train_dataloader(self) -> DataLoader:
        from accelerate.data_loader import (  # type: ignore[import-untyped]  # it has no stubs
            SeedableRandomSampler,
        )

        loader: Any = super().get_train_dataloader()
        order = loader.get_sampler()
        if type(order) is SeedableRandomSampler:
            loader.set_sampler(ShuffledOrder(len(order), order.initial_seed))
        return loader


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: TrainingArguments,
    blocks: Blocks,
    held_out: Blocks | None,
    callbacks: Sequence[TrainerCallback],
) -> _Trainer:
    """A Trainer that evaluates, draws and keeps checkpoints in our way."""
    kept, arguments.save_total_limit = arguments.save_total_limit, None
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=whole_batches(blocks, runs.batch_size(arguments)),
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=RunningLoss(),
        callbacks=[KeepFolder(kept), *callbacks],
    )
    if arguments.fsdp and not trainer.is_fsdp_enabled:
        logger.warning("fsdp shards only on accelerators; here each process keeps all weights")
    return trainer


@contextmanager
def _as_before(model: PreTrainedModel) -> Iterator[None]:
    """Let `model`, which may be the caller's, cache and save afterwards as it did before."""
    kept = model._keys_to_ignore_on_save
    # A checkpoint holds tied weights once; the Trainer would warn that the others are missing.
    model._keys_to_ignore_on_save = (kept or set()) | model.all_tied_weights_keys.keys()
    try:
        yield
    finally:
        model._keys_to_ignore_on_save = kept
        model.config.use_cache = True  # the Trainer has turned it off


def run_to_end(
    trainer: _Trainer,
    checkpoint: Path | None,
    merge_lora: bool,
    describe: Callable[[TrainerState], None],
) -> bool:
    """Train, from `checkpoint` on if there is one, and save; whether a signal ended it before.

    `describe` writes the card of what was saved.
    """
    from ..engine.swap import optimize_for_training, restore

    model_class = type(trainer.model)
    with _as_before(trainer.model), StopOnSignal(announce=trainer.is_world_process_zero()) as stop:
        trainer.add_callback(stop)
        with ExitStack() as engine:
            is_ours = isinstance(trainer.model, ScratchGPTForCausalLM)
            is_whole = not (trainer.is_fsdp_enabled or trainer.args.torch_compile)
            if is_ours and is_whole and trainer.args.device.type == "cpu":
                # The caller may have optimized it for generation.
                optimize_for_training(restore(trainer.model))
                engine.callback(restore, trainer.model)
                trainer.by_engine = True
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        interrupted = stop.stopped and trainer.state.global_step < trainer.state.max_steps
        if not interrupted:
            _save(trainer, model_class, merge_lora)
            if trainer.args.should_save:
                describe(trainer.state)
            trainer.save_state()  # last, as it says that all is there
        trainer.accelerator.wait_for_everyone()
    return interrupted


def _save(trainer: Trainer, model_class: type[PreTrainedModel], merge_lora: bool) -> None:
    """Save model and tokenizer, also where FSDP has changed the class and sharded the weights."""
    trainer.model.config.use_cache = True  # the Trainer has turned it off
    if merge_lora:
        if trainer.args.should_save:
            trainer.model.merge_and_unload().save_pretrained(trainer.args.output_dir)
            trainer.processing_class.save_pretrained(trainer.args.output_dir)
    elif not trainer.is_fsdp_enabled:
        trainer.save_model()
    else:
        weights = trainer.accelerator.get_state_dict(trainer.model)
        if trainer.args.should_save:
            with torch.device("meta"):
                model = model_class(trainer.model.config)
            model.generation_config = trainer.model.generation_config
            model.save_pretrained(trainer.args.output_dir, state_dict=weights)
            trainer.processing_class.save_pretrained(trainer.args.output_dir)
