"""The chunked loss is transformers' loss."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_scratch_gpt import ScratchGPTForCausalLM
from hf_scratch_gpt.model import loss_scratch_gpt
from hf_scratch_gpt.model.loss_scratch_gpt import chunked_causal_loss

from ..models import VOCABULARY, random_ids, random_model

CASES = {
    "plain": {},
    "items in batch": {"num_items_in_batch": torch.tensor(31)},
    "items as int": {"num_items_in_batch": 31},
    "another index": {"ignore_index": 5},
}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(loss_scratch_gpt, "PIECE", 7 * 8 * VOCABULARY)  # 7 tokens of 8 bytes
    monkeypatch.setattr(loss_scratch_gpt, "_BLOCK", 3 * VOCABULARY)
    monkeypatch.setattr(loss_scratch_gpt, "_WORDS", VOCABULARY // 2 - 1)


def gradients(loss, *leaves):
    (2 * loss).backward()  # as gradient scaling does
    return [leaf.grad.clone() for leaf in leaves]


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case):
    labels = random_ids(3, 11)
    labels[0, 4:] = -100
    labels[1, 3] = 5
    if case == "another index":
        labels[labels == -100] = 5
    results = []
    for chunked in (False, True):
        torch.manual_seed(0)
        hidden = torch.randn(3, 11, 16, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(VOCABULARY, 16, dtype=torch.float64, requires_grad=True)
        if chunked:
            loss = chunked_causal_loss(hidden, weight, labels, **CASES[case])
        else:
            loss = ForCausalLMLoss(hidden @ weight.T, labels, VOCABULARY, **CASES[case])
        results.append([loss.detach(), *gradients(loss, hidden, weight)])
    for expected, own in zip(*results, strict=True):  # the loss is of float32 in both
        torch.testing.assert_close(own, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("is_ahead", [True, False])
def test_float32_by_onednn_or_not(is_ahead, monkeypatch):
    monkeypatch.setattr("hf_scratch_gpt.engine.onednn._IS_AHEAD", is_ahead)
    calls, by_onednn = [], loss_scratch_gpt.by_onednn
    monkeypatch.setattr(
        loss_scratch_gpt, "by_onednn", lambda *args: calls.append(1) or by_onednn(*args)
    )
    labels, results = random_ids(2, 9), []
    start, weight = torch.randn(2, 9, 16), torch.randn(VOCABULARY, 16)
    for dtype in (torch.float64, torch.float32):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (start, weight)]
        loss = chunked_causal_loss(*leaves, labels)
        results.append([loss.detach(), *gradients(loss, *leaves)])
    for expected, own in zip(*results, strict=True):
        torch.testing.assert_close(own.double(), expected.double(), atol=1e-6, rtol=1e-5)
    assert bool(calls) is is_ahead


def test_labels_that_are_shifted_already():
    hidden, weight = torch.randn(2, 9, 16), torch.randn(VOCABULARY, 16)
    labels = random_ids(2, 9)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    expected = chunked_causal_loss(hidden, weight, labels)
    assert torch.equal(chunked_causal_loss(hidden, weight, None, shift_labels=shifted), expected)


def test_no_label_counts():
    hidden = torch.randn(1, 5, 16, requires_grad=True)
    weight = torch.randn(VOCABULARY, 16, requires_grad=True)
    loss = chunked_causal_loss(hidden, weight, torch.full((1, 5), -100))
    loss.backward()
    assert loss.isnan()  # as torch's mean over nothing
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_a_frozen_head():
    hidden, weight = torch.randn(2, 9, 16), torch.randn(VOCABULARY, 16)
    labels, grads = random_ids(2, 9), []
    for is_frozen in (False, True):
        leaf = hidden.clone().requires_grad_()
        head = weight.clone().requires_grad_(not is_frozen)
        chunked_causal_loss(leaf, head, labels).backward()
        grads.append(leaf.grad)
        assert (head.grad is None) == is_frozen
    assert torch.equal(*grads)


def test_gradients_twice():
    """What backward hands out is not changed by what is later added to it."""
    hidden, weight = torch.randn(2, 9, 16), torch.randn(VOCABULARY, 16, requires_grad=True)
    loss = chunked_causal_loss(hidden, weight, random_ids(2, 9))
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    assert torch.equal(weight.grad, 2 * once)


@pytest.mark.usefixtures("slow_half")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_its_digits(dtype):
    hidden, weight = torch.randn(1, 2000, 16), torch.randn(VOCABULARY, 16) / 4
    labels, grads = random_ids(1, 2000), []
    for kind in (dtype, torch.float64):
        leaf = weight.to(dtype).to(kind).requires_grad_()
        states = hidden.to(dtype).to(kind)
        loss = (
            chunked_causal_loss(states, leaf, labels)
            if kind is dtype
            else ForCausalLMLoss(states @ leaf.T, labels, VOCABULARY)
        )
        loss.backward()
        grads.append(leaf.grad.double())
    assert (grads[0] - grads[1]).norm() / grads[1].norm() < 0.01


@pytest.mark.parametrize("shape", [(2, 8), (1, 9), (9,)])
def test_labels_of_another_shape(shape):
    with pytest.raises(ValueError, match="give one label for each"):
        chunked_causal_loss(torch.randn(2, 9, 16), torch.randn(VOCABULARY, 16), random_ids(*shape))


def models():
    """A model, and the same with a chunked loss, both without dropout."""
    pair = []
    for chunked in (False, True):
        torch.manual_seed(0)
        model = random_model(ScratchGPTForCausalLM, drop_rate=0.0, chunked_loss=chunked)
        pair.append(model.train())
    return pair


@pytest.mark.usefixtures("slow_half")
@pytest.mark.parametrize("autocast", [False, True])
def test_model_trains_as_before(autocast):
    ids = random_ids(4, 20)
    losses = []
    for model in models():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(10):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                outputs = model(ids, labels=ids)
            outputs.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(outputs.loss.item())
        assert (outputs.logits is None) == model.config.chunked_loss
    assert losses[1] == pytest.approx(losses[0], rel=5e-3 if autocast else 1e-5)


def test_logits_where_they_are_asked_for():
    _, model = models()
    ids = random_ids(2, 8)
    assert model(ids).logits.shape == (2, 8, VOCABULARY)
    with torch.no_grad():
        assert model(ids, labels=ids).logits.shape == (2, 8, VOCABULARY)
    assert model.eval()(ids, labels=ids).logits.shape == (2, 8, VOCABULARY)


def test_what_is_set_on_the_model_still_counts():
    ids = random_ids(2, 8)
    _, model = models()
    model.loss_function = lambda logits, **arguments: logits.sum() * 0 + 7
    assert model(ids, labels=ids).loss == 7
    _, model = models()
    seen = []
    model.lm_head.register_forward_hook(lambda *arguments: seen.append(1))
    model(ids, labels=ids)
    assert seen


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


def biased(model):
    model.lm_head.bias = torch.nn.Parameter(torch.arange(VOCABULARY) / 10)


def with_a_forward(model):
    model.lm_head.forward = lambda x: 2 * torch.nn.functional.linear(x, model.lm_head.weight)


def scaled_backward(model):
    model.lm_head.register_full_backward_hook(lambda module, given, out: (3 * given[0],))


@pytest.mark.parametrize("change", [biased, with_a_forward, scaled_backward])
def test_a_head_that_is_changed_or_watched(change):
    model, ids = random_model(ScratchGPTForCausalLM, drop_rate=0.0), random_ids(2, 9)
    model.train()
    change(model)
    results = []
    for chunked in (False, True):
        model.config.chunked_loss = chunked
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append((loss.item(), model.model.norm.weight.grad.clone()))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[1][1], results[0][1])


def test_a_loss_that_transformers_was_given(monkeypatch):
    from transformers.loss import loss_utils

    monkeypatch.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", lambda **kwargs: torch.tensor(7.0))
    model = random_model(ScratchGPTForCausalLM, chunked_loss=True).train()
    assert model(random_ids(1, 9), labels=random_ids(1, 9)).loss == 7


def test_a_resized_head_is_still_in_pieces():
    model = random_model(ScratchGPTForCausalLM, chunked_loss=True, tie_word_embeddings=False)
    model.train().resize_token_embeddings(101, mean_resizing=False)
    ids = random_ids(2, 9)
    assert model(ids, labels=ids).logits is None
    assert model.lm_head.weight.shape == (101, 32)


def test_where_tensors_have_no_values():
    with torch.device("meta"):
        model = random_model(ScratchGPTForCausalLM, chunked_loss=True).train()
        ids = torch.zeros(2, 9, dtype=torch.long)
        assert model(ids, labels=ids).loss.shape == ()


def test_torch_func():
    model = random_model(ScratchGPTForCausalLM, drop_rate=0.0).train()
    ids = random_ids(2, 9)
    vectors = model.get_input_embeddings()(ids).detach()
    results = []
    for model.config.chunked_loss in (False, True):
        loss = lambda x: model(inputs_embeds=x, labels=ids, use_cache=False).loss  # noqa: E731
        results.append(torch.func.grad(loss)(vectors))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(("label", "named"), [(VOCABULARY, VOCABULARY), (-1, -1)])
def test_labels_outside_of_the_vocabulary(label, named):
    labels = random_ids(2, 9)
    labels[1, 3] = label
    with pytest.raises(ValueError, match=f"label {named} is outside of the vocabulary of 97 tok"):
        chunked_causal_loss(torch.randn(2, 9, 16), torch.randn(VOCABULARY, 16), labels)


def test_fake_tensors():
    with FakeTensorMode():
        model = random_model(ScratchGPTForCausalLM, chunked_loss=True).train()
        ids = torch.zeros(2, 9, dtype=torch.long)
        assert model(ids, labels=ids).loss.shape == ()


# torch's compiler looks at it where it leaves code to Python
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled():
    model = random_model(ScratchGPTForCausalLM, chunked_loss=True, drop_rate=0.0).train()
    ids = random_ids(2, 9)
    compiled = torch.compile(model, backend="eager")
    assert compiled(ids, labels=ids).loss.item() == pytest.approx(
        model(ids, labels=ids).loss.item()
    )
