"""Training in half precision, whether the CPU has instructions for it or not."""

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from hf_scratch_gpt import MultiHeadAttention, ScratchGPTForCausalLM
from hf_scratch_gpt.engine import half as half_scratch_gpt

from ..models import random_ids, random_model, tiny_config

pytestmark = pytest.mark.usefixtures("slow_half")


def gradients(model, dtype, mask=None):
    ids = random_ids(2, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "autocast"):
        loss = model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.double().flatten() for p in model.parameters()])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["autocast", torch.bfloat16], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("scaled", [True, False])
def test_gradients(attention, dtype, padded, scaled):
    model = random_model(
        ScratchGPTForCausalLM,
        attn_implementation=attention,
        drop_rate=0.0,
        scale_attn_weights=scaled,
    )
    model.train()
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    given = mask if padded else None
    torch.manual_seed(1)
    exact = gradients(copy.deepcopy(model).double(), torch.float64, given)
    torch.manual_seed(1)
    own = gradients(model if dtype == "autocast" else model.to(dtype), dtype, given)
    assert own[0] == pytest.approx(exact[0], rel=1e-2)
    assert (own[1] - exact[1]).norm() < 0.05 * exact[1].norm()


def test_gradient_checkpointing():
    model = random_model(ScratchGPTForCausalLM, drop_rate=0.0).train()
    results = []
    for is_on in (False, True):
        if is_on:
            model.activation_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(1)
        results.append(gradients(model, "autocast")[1])
    torch.testing.assert_close(results[1], results[0], atol=1e-3, rtol=1e-2)


def test_dropout_in_attention():
    """The same seed drops the same weights, forward and backward; without dropout, none."""
    model = random_model(ScratchGPTForCausalLM, drop_rate=0.0).train()
    ids, results = random_ids(2, 20), []
    for dropout, seed in ((0.5, 1), (0.5, 1), (0.5, 2), (0.0, 1), (0.0, 2)):
        for block in model.model.layers:
            block.self_attn.attention_dropout = dropout
        model.zero_grad()
        torch.manual_seed(seed)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(ids, labels=ids).loss.backward()
        results.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    same, again, other, none, none_again = results
    torch.testing.assert_close(again, same)
    torch.testing.assert_close(none_again, none)
    assert (other - same).norm() > 0.1 * same.norm()
    assert (none - same).norm() > 0.1 * same.norm()


def test_attention_answers_in_half_precision():
    model = random_model(ScratchGPTForCausalLM, drop_rate=0.0).train()
    dtypes = []
    attention = model.model.layers[0].self_attn
    attention.register_forward_hook(lambda module, args, output: dtypes.append(output[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(random_ids(2, 20))
    assert dtypes == [torch.bfloat16]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_whoever_watches_what_is_kept_sees_attention(attention):
    """As checkpointing and offloading do."""
    model = random_model(ScratchGPTForCausalLM, attn_implementation=attention, drop_rate=0.0)
    model.train()
    seen = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x) or x, lambda x: x),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        model(random_ids(2, 20))
    sizes = {tuple(x.shape) for x in seen}
    of_scores = {(2, 4, 20, 20), (8, 20, 20)} if attention == "eager" else {(2, 4, 20, 8)}
    assert sizes & of_scores


def test_attention_keeps_half_precision():
    model = random_model(ScratchGPTForCausalLM, drop_rate=0.0).train()
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        model(random_ids(2, 20))
    of_heads = [x for x in kept if x.shape == (2, 4, 20, 8)]
    assert len(of_heads) == 3 * 4  # query, key, value and what is gathered
    assert {x.dtype for x in of_heads} == {torch.bfloat16}


def test_attention_can_be_differentiated_twice_where_torchs_can():
    attention = MultiHeadAttention(tiny_config(attn_implementation="sdpa"), 0).eval().bfloat16()
    x = torch.randn(2, 9, 32).bfloat16().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        (slope,) = torch.autograd.grad(attention(x)[0].sum(), x, create_graph=True)
        slope.square().sum().backward()
    assert x.grad.norm() > 0
    (slope,) = torch.autograd.grad(attention(x)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        slope.square().sum().backward()


def test_attention_of_fewer_queries_than_keys():
    """As where a cache is trained with; and of one token, and of one that is not causal."""
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        torch.manual_seed(3)
        attention = MultiHeadAttention(tiny_config(attn_implementation="sdpa"), 0).eval().to(dtype)
        cache, of_pieces = DynamicCache(), []
        x = torch.randn(2, 9, 32).to(dtype).requires_grad_()
        for piece in (x[:, :6], x[:, 6:7], x[:, 7:8]):
            of_pieces.append(attention(piece, cache=cache)[0])
        of_pieces.append(attention(x, is_causal=False)[0])
        torch.cat(of_pieces, dim=1).double().square().sum().backward()
        results.append((*of_pieces, x.grad))
    for exact, own in zip(*results, strict=True):
        assert (own.double() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("dtype", ["autocast", torch.bfloat16], ids=str)
def test_a_mask_of_many_values(dtype, slow_half):
    """Large numbers that differ by little, as those that tell how far tokens are apart."""
    if not slow_half:
        pytest.skip("torch rounds the mask where half precision is multiplied as such")
    model = random_model(ScratchGPTForCausalLM, drop_rate=0.0, num_hidden_layers=1).train()
    places = torch.arange(20.0)
    mask = (places[None] - places[:, None]) * 1.37 - 200
    mask = mask.masked_fill(places[None] > places[:, None], -1e4).expand(2, 1, 20, 20)
    results = []
    for each, kind in [
        (copy.deepcopy(model).double(), torch.float64),
        (model if dtype == "autocast" else model.to(dtype), dtype),
    ]:
        torch.manual_seed(1)
        gradients(each, kind, mask.double() if kind == torch.float64 else mask)
        results.append(each.model.layers[0].self_attn.k_proj.weight.grad.double())
    exact, own = results
    assert (own - exact).norm() < 0.1 * exact.norm()


@torch.no_grad()
def test_attention_is_widened_where_that_is_faster(monkeypatch):
    seen = []
    attend = half_scratch_gpt.attend_in_float32
    monkeypatch.setattr(
        "hf_scratch_gpt.model.blocks_scratch_gpt.attend_in_float32",
        lambda *args, **kwargs: seen.append(1) or attend(*args, **kwargs),
    )
    is_slow = half_scratch_gpt.is_slow(torch.bfloat16)
    for attention, with_gradient, layers in [
        ("sdpa", False, 0),
        ("sdpa", True, 3),
        ("eager", False, 3),
        ("eager", True, 3),
    ]:
        model = random_model(ScratchGPTForCausalLM, attn_implementation=attention).bfloat16()
        seen.clear()
        with torch.set_grad_enabled(with_gradient):
            model(random_ids(1, 9))
        assert len(seen) == (layers if is_slow else 0)
