"""The loss in pieces is transformers' loss."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_scratch_gpt import ScratchGPTForCausalLM, optimize_for_training
from hf_scratch_gpt.engine import half, loss
from hf_scratch_gpt.engine.loss import LossInPieces

from ..models import VOCABULARY, random_ids, random_model

CASES = {
    "plain": {},
    "items in batch": {"num_items_in_batch": torch.tensor(31)},
    "items as int": {"num_items_in_batch": 31},
    "another index": {"ignore_index": 5},
}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(loss, "_PIECE", 7 * VOCABULARY)


def causal_loss(hidden, weight, *args, **kwargs):
    model = LossInPieces()
    model.lm_head = SimpleNamespace(weight=weight, bias=None)
    return model.loss_in_pieces(hidden, *args, **kwargs)


def gradients(of, *leaves):
    (2 * of).backward()  # as gradient scaling does
    return [leaf.grad.clone() for leaf in leaves]


def make(*shape):
    sizes = (*shape, 16), (VOCABULARY, 16)
    return [torch.randn(size, requires_grad=True) for size in sizes]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("is_ahead", [True, False])
def test_equals_transformers(case, dtype, is_ahead, monkeypatch):
    monkeypatch.setattr(half, "_IS_AHEAD", is_ahead)
    labels = random_ids(3, 11)
    labels[0, 4:] = -100
    labels[1, 3] = 5
    if case == "another index":
        labels[labels == -100] = 5
    leaves = make(3, 11)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    own = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    expected = ForCausalLMLoss(exact[0] @ exact[1].T, labels, VOCABULARY, **CASES[case])
    found = causal_loss(*own, labels, **CASES[case])
    torch.testing.assert_close(found.double(), expected.double(), atol=1e-6, rtol=1e-5)
    for mine, theirs in zip(gradients(found, *own), gradients(expected, *exact), strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=1e-6, rtol=1e-5)


def test_labels_that_are_shifted_already():
    hidden, weight = make(2, 9)
    labels = random_ids(2, 9)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    expected = causal_loss(hidden, weight, labels)
    assert torch.equal(causal_loss(hidden, weight, None, shift_labels=shifted), expected)


def test_no_label_counts():
    hidden, weight = make(1, 5)
    found = causal_loss(hidden, weight, torch.full((1, 5), -100))
    found.backward()
    assert found.isnan()  # as torch's mean over nothing
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_a_frozen_head_and_gradients_twice():
    hidden, weight = make(2, 9)
    labels = random_ids(2, 9)
    found = causal_loss(hidden, weight, labels)
    found.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in (hidden, weight)]
    found.backward()
    assert torch.equal(weight.grad, 2 * once[1])
    hidden.grad = None
    causal_loss(hidden, weight.detach(), labels).backward()
    assert torch.equal(hidden.grad, once[0])


@pytest.mark.usefixtures("slow_half")
def test_half_precision_keeps_its_digits():
    hidden, weight = torch.randn(1, 2000, 16).bfloat16(), torch.randn(VOCABULARY, 16).bfloat16() / 4
    labels = random_ids(1, 2000)
    own, exact = weight.clone().requires_grad_(), weight.double().requires_grad_()
    causal_loss(hidden, own, labels).backward()
    ForCausalLMLoss(hidden.double() @ exact.T, labels, VOCABULARY).backward()
    assert (own.grad.double() - exact.grad).norm() / exact.grad.norm() < 0.01


def test_errors_are_those_of_the_model():
    model = models()[1]
    ids, labels = random_ids(2, 9), random_ids(2, 9)
    labels[1, 3] = VOCABULARY
    with pytest.raises(RuntimeError, match=f"index {VOCABULARY} is out of bounds"):
        model(ids, labels=labels)
    with pytest.raises(ValueError, match="give one label for each"):
        model(ids, labels=labels[:, 1:])


def models(**fields):
    """A model, and the same with a loss in pieces, both without dropout."""
    model = random_model(ScratchGPTForCausalLM, drop_rate=0.0, **fields).train()
    own = copy.deepcopy(model)
    own.config.chunked_loss = True
    return model, optimize_for_training(own)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer(tmp_path, smoothing):
    """Gradient accumulation over texts of unequal lengths, and label smoothing."""
    texts = [{"input_ids": ids, "labels": ids} for ids in random_ids(8, 12)]
    for text in texts[::2]:
        text["labels"] = text["labels"].clone()
        text["labels"][:7] = -100
    weights = []
    for model in models():
        arguments = TrainingArguments(
            output_dir=tmp_path,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            max_steps=2,
            learning_rate=1e-3,
            label_smoothing_factor=smoothing,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        Trainer(model, arguments, train_dataset=texts).train()
        weights.append(model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=2e-5, rtol=1e-3)


def test_a_head_with_a_bias_is_left_to_the_model():
    ids, losses = random_ids(2, 9), []
    for model in models():
        model.lm_head.bias = torch.nn.Parameter(torch.arange(VOCABULARY) / 10)
        losses.append(model(ids, labels=ids).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
