"""A loss in pieces is transformers' loss."""

import pytest
import torch
from transformers import GPT2LMHeadModel

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


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_gpt2s(case, chunked, small_gpt2, monkeypatch):
    monkeypatch.setattr("hf_scratch_gpt.model.modeling_scratch_gpt.LOSS_PIECE", 7)
    ids, labels = random_ids(3, 11), random_ids(3, 11)
    labels[0, 4:] = 5 if case == "another index" else -100
    results = []
    for model_class in (GPT2LMHeadModel, ScratchGPTForCausalLM):
        no_dropout = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0)
        model = model_class.from_pretrained(small_gpt2, **no_dropout).double().train()
        model.loss_type = "ForCausalLM"  # which GPT-2 does not say of itself
        model.config.chunked_loss = chunked
        outputs = model(ids, labels=labels, **CASES[case])
        assert (outputs.logits is None) == (chunked and model_class is ScratchGPTForCausalLM)
        (2 * outputs.loss).backward()  # as gradient scaling does
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= parameter.grad
            results.append([outputs.loss, model.eval()(ids).logits])
    for expected, own in zip(*results, strict=True):  # the loss is of float32 in both
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)


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
