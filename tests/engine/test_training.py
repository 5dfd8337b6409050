"""A model that is optimized for training learns the same, and keeps less for the backward pass."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.backends import mkldnn
from transformers import DynamicCache

from hf_scratch_gpt import (
    FeedForward,
    ScratchGPTForCausalLM,
    ScratchGPTForSequenceClassification,
    optimize_for_training,
    restore,
)
from hf_scratch_gpt.engine import half
from hf_scratch_gpt.engine.training import LeanFeedForward, LeanLinear, own_product

from ..models import random_ids, random_model, tiny_config
from .test_packed import exchange

DTYPES = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def layer(dtype=torch.float32, bias=True):
    return exchange(nn.Linear(48, 80, bias=bias).to(dtype), LeanLinear)


def feed_forward():
    mlp = FeedForward(tiny_config(hidden_dropout=0.0)).train()
    for part in (mlp.up_proj, mlp.down_proj):
        exchange(part, LeanLinear)
    return exchange(mlp, LeanFeedForward)


@pytest.fixture
def kept():
    """What is kept for the backward pass."""
    tensors = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        yield tensors


def by_torch(x, weight, bias, gelu):
    """What autocast makes of torch's own functions."""
    if gelu is not None:
        x = nn.functional.gelu(x.to(torch.get_autocast_dtype("cpu")), approximate=gelu)
    return nn.functional.linear(x, weight, bias)


@pytest.mark.usefixtures("slow_half")
@pytest.mark.parametrize("gelu", [None, "tanh", "none"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (2, 70, 48), (0, 48)], ids=str)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(narrow, shape, bias, gelu):
    linear, start, results = layer(bias=bias), torch.randn(shape), []
    for function in (own_product, by_torch):
        x = start.clone().requires_grad_()
        linear.zero_grad()
        with torch.autocast("cpu", dtype=narrow):
            y = function(x, linear.weight, linear.bias, gelu)
        (y.float() ** 2).sum().backward()
        results.append([y, x.grad, *(p.grad for p in linear.parameters())])
    for own, torchs in zip(*results, strict=True):
        assert own.dtype == torchs.dtype
        assert own.shape == torchs.shape
        assert (own - torchs).norm() <= 0.01 * torchs.norm()


@pytest.mark.usefixtures("slow_half")
@pytest.mark.parametrize("is_ahead", [True, False])
@pytest.mark.parametrize("gelu", [None, "tanh"])
@pytest.mark.parametrize("kind", DTYPES, ids=str)
def test_without_autocast(kind, gelu, is_ahead, monkeypatch):
    """A model that is in half precision itself, or in float32."""
    monkeypatch.setattr(half, "_IS_AHEAD", is_ahead)
    linear, start, results = layer(kind), torch.randn(70, 48).to(kind), []
    for dtype in (kind, torch.float64):
        exact, x = copy.deepcopy(linear).to(dtype), start.to(dtype, copy=True).requires_grad_()
        if dtype == kind and gelu is not None:
            y = own_product(x, exact.weight, exact.bias, gelu)
        else:
            y = exact(x if gelu is None else nn.functional.gelu(x, approximate=gelu))
        y.sum().backward()
        results.append([y, x.grad, *(p.grad for p in exact.parameters())])
    for own, exact in zip(*results, strict=True):
        assert own.dtype == kind
        assert (own.double() - exact).norm() <= DTYPES[kind] * exact.norm()


def test_autocast_keeps_no_copy_of_the_weight(kept):
    linear = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear(torch.randn(3, 48))
    shapes = {(tuple(t.shape), t.dtype) for t in kept}
    assert shapes == {((3, 48), torch.bfloat16), ((80, 48), torch.float32)}
    assert any(t.data_ptr() == linear.weight.data_ptr() for t in kept)
    kept.clear()
    linear.weight.requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear(torch.randn(3, 48, requires_grad=True))
    assert [tuple(t.shape) for t in kept] == [(80, 48)]


@pytest.mark.parametrize("autocast", [True, False])
def test_the_feed_forward_keeps_what_goes_into_gelu_alone(kept, autocast):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        feed_forward()(torch.randn(2, 9, 32))
    inner = {t.data_ptr() for t in kept if t.shape[-1] == 4 * 32 and t.numel() == 18 * 4 * 32}
    assert len(inner) == 1


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_frozen_parts_get_no_gradient(frozen):
    linear, x = layer(), torch.randn(3, 48, requires_grad=True)
    parts = {"x": x, "weight": linear.weight, "bias": linear.bias}
    parts[frozen].requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own_product(x, linear.weight, linear.bias, gelu="tanh").sum().backward()
    assert {name for name, part in parts.items() if part.grad is None} == {frozen}


@pytest.mark.parametrize("narrow", [torch.bfloat16, None], ids=str)
def test_a_product_can_be_changed_in_place(narrow):
    """As hooks that steer a model do."""
    linear, x = layer(), torch.randn(2, 5, 48)
    with torch.autocast("cpu", dtype=narrow, enabled=narrow is not None):
        y = linear(x)
    y += 1
    y.sum().backward()
    expected = x.sum((0, 1)).expand(80, 48)
    torch.testing.assert_close(linear.weight.grad, expected, atol=0.1, rtol=2e-2)


def test_compiled_and_without_onednn(monkeypatch):
    monkeypatch.setattr(half, "_IS_AHEAD", True)
    linear, x = layer(), torch.randn(3, 48)
    expected = linear(x)
    torch.testing.assert_close(torch.compile(linear, backend="eager", fullgraph=True)(x), expected)
    mkldnn.set_flags(_enabled=False)
    try:
        torch.testing.assert_close(linear(x), expected)
    finally:
        mkldnn.set_flags(_enabled=True)


def test_hooks_see_all_modules():
    mlp, seen = feed_forward(), []
    mlp.activation.register_forward_hook(lambda module, args, output: seen.append(1) or 0 * output)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mlp(torch.randn(2, 32, requires_grad=True))
    assert seen
    torch.testing.assert_close(y.float(), mlp.down_proj.bias.expand(2, 32), atol=1e-2, rtol=1e-2)


def gradients(model, dtype, mask=None):
    ids = random_ids(2, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "autocast"):
        loss = model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.double().flatten() for p in model.parameters()])


def learner(dtype=torch.float32, **fields):
    model = random_model(ScratchGPTForCausalLM, drop_rate=0.0, **fields).train().to(dtype)
    return optimize_for_training(model)


@pytest.mark.usefixtures("slow_half")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["autocast", torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("is_padded", [False, True])
def test_gradients(attention, dtype, is_padded):
    fields = dict(attn_implementation=attention, drop_rate=0.0, chunked_loss=True)
    model = random_model(ScratchGPTForCausalLM, **fields).train()
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    given = mask if is_padded else None
    torch.manual_seed(1)
    exact = gradients(copy.deepcopy(model).double(), torch.float64, given)
    own = optimize_for_training(model if dtype == "autocast" else model.to(dtype))
    torch.manual_seed(1)
    loss, slopes = gradients(own, dtype, given)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert loss == pytest.approx(exact[0], rel=tolerance)
    assert (slopes - exact[1]).norm() < tolerance * exact[1].norm()


def test_slow_attention_learns_in_float32(monkeypatch):
    """What comes of it is in half precision, and the model's attention keeps its name."""
    monkeypatch.setattr(half, "_SLOW_DTYPES", frozenset([torch.bfloat16]))
    seen, attend = [], nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda query, *args, **kwargs: seen.append(query.dtype) or attend(query, *args, **kwargs),
    )
    model = learner(torch.bfloat16)
    for mask in (None, torch.zeros(1, 1, 9, 9, dtype=torch.bfloat16)):
        model(random_ids(1, 9), attention_mask=mask).logits.sum().backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, _ = model.float().model.layers[0].self_attn(torch.randn(1, 9, 32), mask)
        assert output.dtype == torch.bfloat16
        model.to(torch.bfloat16)
    assert seen == 8 * [torch.float32]
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    weights = model(random_ids(1, 9), output_attentions=True).attentions
    assert [each.dtype for each in weights] == 3 * [torch.bfloat16]
    assert restore(model).config._attn_implementation == "eager"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks by it
@pytest.mark.parametrize("first", [True, False])
def test_adapters_of_slow_half_precision(first, monkeypatch):
    """Added before and after: what they wrap takes what it is given."""
    monkeypatch.setattr(half, "_SLOW_DTYPES", frozenset([torch.bfloat16]))
    model = random_model(ScratchGPTForCausalLM, drop_rate=0.0).train().to(torch.bfloat16)
    model = model if first else optimize_for_training(model)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    if first:
        optimize_for_training(adapted.base_model.model)
    adapted(input_ids=(ids := random_ids(2, 9)), labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in adapted.parameters() if p.requires_grad)


def test_gradient_checkpointing_and_dropout():
    results = []
    for is_on in (False, True):
        model = random_model(ScratchGPTForCausalLM, drop_rate=0.3).train()
        if is_on:
            model.activation_checkpointing_enable()
        torch.manual_seed(1)
        results.append(gradients(optimize_for_training(model), "autocast")[1])
        torch.manual_seed(0)
    torch.testing.assert_close(results[1], results[0], atol=1e-3, rtol=1e-2)


def test_training_with_a_cache():
    model = learner()
    ids, cache = random_ids(2, 9), DynamicCache()
    whole = model(ids).logits
    pieces = [model(piece, cache=cache).logits for piece in (ids[:, :6], ids[:, 6:7], ids[:, 7:])]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_other_heads():
    model = random_model(ScratchGPTForSequenceClassification, num_labels=2).train()
    ids, labels = random_ids(2, 9), torch.tensor([0, 1])
    exact = copy.deepcopy(model)
    own = optimize_for_training(model)
    for each in (exact, own):
        torch.manual_seed(1)
        each(ids, labels=labels).loss.backward()
    for mine, theirs in zip(own.parameters(), exact.parameters(), strict=True):
        assert (mine.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm() + 1e-6
    assert type(own).__name__ == "ScratchGPTForSequenceClassification"
