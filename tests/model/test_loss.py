"""A loss in pieces is transformers' loss."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_scratch_gpt import ScratchGPTForCausalLM

from ..models import VOCABULARY, random_ids, random_model

CASES = {
    "plain": {},
    "items in batch": {"num_items_in_batch": torch.tensor(31)},
    "items as int": {"num_items_in_batch": 31},
    "another index": {"ignore_index": 5},
    "shifted": {"shift_labels": random_ids(3, 11)},
}


def models(**fields):
    """A model, and the same with a loss in pieces, both without dropout."""
    pair = []
    for chunked in (False, True):
        torch.manual_seed(0)
        model = random_model(ScratchGPTForCausalLM, drop_rate=0.0, chunked_loss=chunked, **fields)
        pair.append(model.train())
    return pair


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_transformers(case, monkeypatch):
    monkeypatch.setattr("hf_scratch_gpt.model.modeling_scratch_gpt.LOSS_PIECE", 7)
    ids, labels = random_ids(3, 11), random_ids(3, 11)
    labels[0, 4:] = 5 if case == "another index" else -100
    results = []
    for model in models():
        outputs = model.double()(ids, labels=labels, **CASES[case])
        assert (outputs.logits is None) == model.config.chunked_loss
        (2 * outputs.loss).backward()  # as gradient scaling does
        results.append([outputs.loss, *(parameter.grad for parameter in model.parameters())])
    for expected, own in zip(*results, strict=True):  # the loss is of float32 in both
        torch.testing.assert_close(own, expected, atol=1e-6, rtol=1e-5)


def test_half_precision_keeps_the_digits_of_the_mean():
    ids = random_ids(4, 60)
    exact, pieces = models()
    expected = exact.to(torch.bfloat16).double()(ids, labels=ids).loss
    loss = pieces.to(torch.bfloat16)(ids, labels=ids).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)


def test_logits_where_they_are_asked_for():
    _, model = models()
    ids = random_ids(2, 8)
    assert model(ids).logits.shape == (2, 8, VOCABULARY)
    assert model.eval()(ids, labels=ids).logits.shape == (2, 8, VOCABULARY)


def test_a_loss_or_a_head_that_is_replaced_still_counts():
    ids = random_ids(2, 8)
    _, model = models()
    model.loss_function = lambda logits, **arguments: logits.sum() * 0 + 7
    assert model(ids, labels=ids).loss == 7
    _, model = models()
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Tanh())
    assert model(ids, labels=ids).logits.abs().max() <= 1


def test_a_head_with_a_bias_and_labels_that_do_not_count():
    ids, losses, none = random_ids(2, 8), [], torch.full((2, 8), -100)
    for model in models():
        model.lm_head.bias = torch.nn.Parameter(torch.arange(VOCABULARY) / 10)
        losses.append(model(ids, labels=ids).loss.item())
        assert model(ids, labels=none).loss.isnan()  # torch's mean over nothing
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.zeros(2, 7, dtype=torch.long), ValueError, "give one label for each"),
        (torch.full((2, 8), VOCABULARY), RuntimeError, "out of bounds"),
    ],
)
def test_labels_that_cannot_be_right(labels, error, message):
    _, model = models()
    with pytest.raises(error, match=message):
        model(random_ids(2, 8), labels=labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer(tmp_path, smoothing):
    """Gradient accumulation over texts of unequal lengths, and label smoothing."""
    texts = [{"input_ids": ids, "labels": ids} for ids in random_ids(8, 12)]
    for text in texts[::2]:
        text["labels"] = text["labels"].clone()
        text["labels"][:7] = -100
    weights = []
    for model in models():
        quiet = dict(report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True)
        steps = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=2)
        steps |= dict(learning_rate=1e-3, label_smoothing_factor=smoothing)
        arguments = TrainingArguments(tmp_path, dataloader_pin_memory=False, **steps, **quiet)
        Trainer(model, arguments, train_dataset=texts).train()
        weights.append(model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=2e-5, rtol=1e-3)
