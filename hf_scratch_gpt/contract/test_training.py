"""Losses by hand, and what Trainer, checkpointed activations and PEFT make of the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from .subject import Subject, blocks, close, matrices, random_ids


def texts_with_labels(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (4, 10) and labels, of which each text has another number."""
    ids = random_ids(model, 4, 10)
    labels = ids.clone()
    for row in range(4):
        labels[row, : 2 * row] = -100
    return ids, labels


def loss_by_hand(logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
    """Of logits (B, T, V) and labels (B, T): token t is compared with label t + 1."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), **options)


def trainer(model: Any, folder: Path, rows: list[Any] | None = None, **options: Any) -> Any:
    """A quiet Trainer on the CPU."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    quiet = dict(report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no")
    arguments = TrainingArguments(output_dir=str(folder), **quiet, **options)
    return Trainer(model=model, args=arguments, train_dataset=rows)


@torch.no_grad()
def test_the_loss_is_that_of_the_next_token(subject: Subject) -> None:
    """With `labels`, token t is compared with label t + 1, and -100 does not count.

    Serves every trainer. Cure: `self.loss_function(logits=..., labels=..., vocab_size=...)`.
    """
    model = subject.random()
    ids, labels = texts_with_labels(model)
    outputs = model(ids, labels=labels)
    close(outputs.loss, loss_by_hand(outputs.logits, labels))


@torch.no_grad()
def test_the_loss_is_divided_by_num_items_in_batch(subject: Subject) -> None:
    """`num_items_in_batch` divides the sum over tokens in place of their number.

    Serves accumulated gradients: the mean of means is not the mean. Cure: `**kwargs` of `forward`
    go to the loss function.
    """
    model = subject.random()
    ids, labels = texts_with_labels(model)
    outputs = model(ids, labels=labels, num_items_in_batch=torch.tensor(50))
    close(outputs.loss, loss_by_hand(outputs.logits, labels, reduction="sum") / 50)


@torch.no_grad()
def test_smoothed_labels_are_shifted(subject: Subject, tmp_path: Path) -> None:
    """Under label smoothing, too, `Trainer` compares token t with label t + 1.

    Serves training by Trainer. Cure: the class's name in `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`.
    """
    model = subject.random()
    ids, labels = texts_with_labels(model)
    run = trainer(model, tmp_path, label_smoothing_factor=0.1)
    loss = run.compute_loss(model, {"input_ids": ids, "labels": labels.clone()})
    close(loss, loss_by_hand(model(ids).logits, labels, label_smoothing=0.1))


def test_a_step_does_not_depend_on_how_the_batch_is_split(subject: Subject, tmp_path: Path) -> None:
    """A step of `Trainer` on four texts equals one of four times one text, and lowers the loss.

    Serves training in little memory. Cure: as for `num_items_in_batch`.
    """
    weights, losses = [], []
    ids, labels = texts_with_labels(subject.random())
    rows = [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]
    for batch, steps in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        model = subject.random()
        sizes = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
        how = dict(optim="sgd", learning_rate=0.1, max_grad_norm=0.0, max_steps=1)
        losses.append(model(ids, labels=labels).loss.item())
        trainer(model, tmp_path, rows, **sizes, **how).train()
        losses.append(model.eval()(ids, labels=labels).loss.item())
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert losses[1] < losses[0]
    close(weights[1], weights[0])


def backward(model: Any, ids: torch.Tensor) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of a loss by name, and how many bytes were kept for them."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad(set_to_none=True)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    named = model.named_parameters()
    return {n: p.grad.clone() for n, p in named if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_activations(subject: Subject, use_reentrant: bool) -> None:
    """Gradients are the same, and less is kept for them, if blocks are computed twice.

    Serves training in little memory. Cure: blocks that are `GradientCheckpointingLayer`s, called
    with `hidden_states` by place; `supports_gradient_checkpointing = True`.
    """
    model = subject.random().train()
    ids = random_ids(model, 4, 32)
    expected, plain = backward(model, ids)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    gradients, kept = backward(model, ids)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        close(gradient, expected[name])
    assert kept < 0.8 * plain


def adapted(model: Any, **options: Any) -> Any:
    """The model under LoRA of PEFT's, with random adapters."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("targets", ["default", "all-linear"])
def test_lora_trains_and_reloads(subject: Subject, targets: str, tmp_path: Path) -> None:
    """PEFT's LoRA learns, by default and in all linear layers, and its adapter reloads.

    Serves fine-tuning. Cure: for the default, enter the `model_type` in PEFT's
    `TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING`; plain `nn.Linear` layers.
    """
    peft = pytest.importorskip("peft")
    base = subject.random()
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, **({} if targets == "default" else {"target_modules": targets}))
    ids = random_ids(base, 4, 10)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    again = subject.model_class.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    with torch.no_grad():
        close(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_lora_in_all_linear_layers(subject: Subject) -> None:
    """`target_modules="all-linear"` adapts each matrix of the blocks, and not the head.

    Serves QLoRA. Cure: plain `nn.Linear` layers, and `get_output_embeddings`.
    """
    base = subject.random()
    count = len(matrices(base))
    model = adapted(base, target_modules="all-linear")
    layers = [name for name, _ in model.named_modules() if name.endswith(".lora_A.default")]
    assert len(layers) == count
    prefix, _ = blocks(base)
    assert all(f".{prefix}." in name for name in layers)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_lora_learns_from_checkpointed_activations(subject: Subject, use_reentrant: bool) -> None:
    """Adapters have their gradients where the model itself is frozen and blocks computed twice.

    Serves QLoRA. Cure: call blocks with `hidden_states` by place; `get_input_embeddings`.
    """
    model = adapted(subject.random(), target_modules="all-linear").train()
    ids = random_ids(model, 2, 10)
    expected, _ = backward(model, ids)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    gradients, _ = backward(model, ids)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        close(gradient, expected[name])
