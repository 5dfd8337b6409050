"""The parts of a model that only generates give what the parts they replace give."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_scratch_gpt import (
    FeedForward,
    MultiHeadAttention,
    ScratchGPTConfig,
    ScratchGPTForCausalLM,
    optimize_for_generation,
)
from hf_scratch_gpt.engine.blocks import (
    ATTENTION,
    PackedAttention,
    PackedFeedForward,
    projections,
)
from hf_scratch_gpt.engine.half import is_slow
from hf_scratch_gpt.engine.packed import Packed, PackedLinear
from hf_scratch_gpt.model.blocks_scratch_gpt import masked_attention

from ..models import random_ids, random_model

MODULE = SimpleNamespace(is_causal=True, training=False, num_key_value_groups=1)


def attend(query, key, value, mask=None):
    attention = ALL_ATTENTION_FUNCTIONS[ATTENTION]
    return attention(MODULE, query, key, value, mask, scaling=0.3)[0]


def in_float64(query, key, value, mask=None):
    if mask is not None:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e300)
    query, key, value = (x.double() for x in (query, key, value))
    return masked_attention(MODULE, query, key, value, mask, scaling=0.3)[0]


def random_heads(tokens, keys, batch=2):
    lengths = (tokens, keys, keys)
    return [torch.randn(batch, length, 3, 8).bfloat16().transpose(1, 2) for length in lengths]


@pytest.mark.parametrize(
    ("tokens", "keys"), [(1, 1), (1, 40), (7, 7), (300, 300), (1000, 1000)], ids=str
)
@torch.no_grad()
def test_attention(tokens, keys, monkeypatch):
    # So few scores at a time that 1,000 tokens take several bands, the last one narrower.
    monkeypatch.setattr("hf_scratch_gpt.engine.blocks._SCORES", 2**19)
    heads = random_heads(tokens, keys)
    own = attend(*heads)
    assert own.dtype == torch.bfloat16
    assert own.is_contiguous()
    torch.testing.assert_close(own.double(), in_float64(*heads), atol=0.03, rtol=0.03)


@pytest.mark.parametrize("tokens", [1, 4, 9])
@torch.no_grad()
def test_attention_with_a_mask(tokens):
    heads = random_heads(tokens, 9)
    mask = torch.ones(2, 1, tokens, 9, dtype=torch.bool).tril(9 - tokens)
    mask[0, :, :, :3] = False  # padding; some of its rows see nothing at all
    own, exact = attend(*heads, mask), in_float64(*heads, mask)
    assert own.isfinite().all()
    is_real = mask[:, 0].any(-1)
    torch.testing.assert_close(own.double()[is_real], exact[is_real], atol=0.03, rtol=0.03)


def test_gradients_go_through_torchs_kernel():
    heads = [x.requires_grad_() for x in random_heads(6, 6)]
    attend(*heads).sum().backward()
    assert all(x.grad is not None for x in heads)


OTHERS = {
    "not causal": lambda heads: dict(module=SimpleNamespace(**vars(MODULE) | {"is_causal": False})),
    "bias": lambda heads: dict(position_bias=torch.randn(1, 3, 9, 9).bfloat16()),
    "is_causal": lambda heads: dict(is_causal=False),
    "mask of a row": lambda heads: dict(attention_mask=torch.ones(1, 1, 1, 9).bool()),
    "mask by heads": lambda heads: dict(attention_mask=torch.rand(2, 3, 9, 9) < 0.7),
    "mask without texts": lambda heads: dict(attention_mask=torch.ones(9, 9).bool()),
    "mask to add": lambda heads: dict(attention_mask=torch.randn(2, 1, 9, 9).bfloat16()),
}


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_what_torchs_kernel_alone_can_do(name):
    heads = random_heads(9, 9)
    given = dict(module=MODULE, attention_mask=None) | OTHERS[name](heads)
    arguments = (given.pop("module"), *heads, given.pop("attention_mask"))
    own = ALL_ATTENTION_FUNCTIONS[ATTENTION](*arguments, scaling=0.3, **given)[0]
    assert torch.equal(own, sdpa_attention_forward(*arguments, scaling=0.3, **given)[0])


@pytest.mark.parametrize("form", ["gelu", "gelu_new"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_packed_feed_forward(dtype, form):
    if is_slow(dtype):
        pytest.skip("this CPU has no instructions for bfloat16, and oneDNN packs nothing")
    config = ScratchGPTConfig(n_embd=48, n_head=4, activation_function=form)
    mlp = FeedForward(config).eval().to(dtype)
    x = torch.randn(2, 5, 48, dtype=dtype)
    exact = copy.deepcopy(mlp).double()(x.double())
    PackedLinear.take_over(mlp.up_proj)
    PackedLinear.take_over(mlp.down_proj)
    PackedFeedForward.take_over(mlp)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(mlp(x).double(), exact, atol=tolerance, rtol=tolerance)
    mlp.activation.register_forward_hook(lambda module, args, output: 0 * output)
    assert torch.equal(mlp(x), mlp.down_proj(torch.zeros(2, 5, 192, dtype=dtype)))


def packed_attention(bias=True, implementation="sdpa"):
    config = ScratchGPTConfig(
        n_embd=48, n_head=4, qkv_bias=bias, drop_rate=0.0, attn_implementation=implementation
    )
    attention = MultiHeadAttention(config, layer_idx=0).eval()
    exact = copy.deepcopy(attention).double()
    PackedAttention.take_over(attention)
    return attention, exact


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_packed_attention(bias, implementation, monkeypatch):
    attention, exact = packed_attention(bias, implementation)
    x, own_cache, exact_cache = torch.randn(2, 7, 48), DynamicCache(), DynamicCache()
    # The three layers would do as well.
    monkeypatch.setattr(
        "hf_scratch_gpt.engine.linear.Linear.forward",
        lambda self, x: (
            torch.nn.functional.linear(x, self.weight, self.bias)
            if self is attention.o_proj or self.weight.dtype == torch.float64
            else 1 / 0
        ),
    )
    for piece in (x[:, :5], x[:, 5:6], x[:, 6:]):
        own, own_weights = attention(piece, cache=own_cache)
        expected, weights = exact(piece.double(), cache=exact_cache)
        torch.testing.assert_close(own.double(), expected, atol=1e-6, rtol=1e-5)
        assert (own_weights is None) == (implementation == "sdpa")
        if own_weights is not None:
            torch.testing.assert_close(own_weights.double(), weights, atol=1e-6, rtol=1e-5)


def double_the_keys(attention):
    attention.k_proj.weight.mul_(2)


def watch_the_values(attention):
    attention.v_proj.register_forward_hook(lambda module, args, output: 2 * output)


def drop_a_bias(attention):
    attention.q_proj.bias = None


def replace_the_query(attention):
    attention.q_proj = torch.nn.Linear(48, 48).requires_grad_(False)


def change_a_bias(attention):
    attention.q_proj.bias.add_(1)


@pytest.mark.parametrize(
    "change",
    [double_the_keys, watch_the_values, drop_a_bias, replace_the_query, change_a_bias],
)
@torch.no_grad()
def test_packed_attention_that_is_changed(change):
    attention, exact = packed_attention()
    torch.manual_seed(1)
    change(attention)
    torch.manual_seed(1)
    change(exact)
    x = torch.randn(2, 7, 48)
    expected = exact.double()(x.double())[0]
    torch.testing.assert_close(attention(x)[0].double(), expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_copies_share_packed_attention():
    attention, _ = packed_attention()
    copied, x = copy.deepcopy(attention), torch.randn(2, 7, 48)
    assert copied.packed.weight is attention.packed.weight
    assert torch.equal(copied(x)[0], attention(x)[0])
    assert copied.packed.is_of(tuple(layer.weight for layer in projections(copied)))
    copied.k_proj.weight.zero_()
    assert not torch.equal(copied(x)[0], attention(x)[0])
    again = copy.deepcopy(copied)
    assert not again.packed.is_of(tuple(layer.weight for layer in projections(again)))
    copied.q_proj = torch.nn.Identity()
    assert type(copy.deepcopy(copied).q_proj) is torch.nn.Identity


@pytest.mark.parametrize("training", [True, False])
def test_packed_attention_learns(training):
    attention, exact = packed_attention()
    x = torch.randn(2, 7, 48)
    for each, given in ((attention, x), (exact, x.double())):
        each.train(training)(given)[0].square().sum().backward()
    for own, expected in zip(attention.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(own.grad.double(), expected.grad, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_packed_attention_drops():
    """In training mode the weights of attention, and the last module always does as it likes."""
    attention, _ = packed_attention()
    x = torch.randn(2, 7, 48)
    expected = attention(x)[0]
    attention.dropout = torch.nn.Dropout(0.5)
    assert (attention(x)[0] == 0).any()
    attention.dropout.register_forward_hook(lambda module, args, output: 3 * args[0])
    torch.testing.assert_close(attention(x)[0], 3 * expected)
    attention.dropout = torch.nn.Identity()
    attention.attention_dropout = 0.5
    assert torch.equal(attention(x)[0], expected)
    assert not torch.allclose(attention.train()(x)[0], expected, atol=1e-3)


@torch.no_grad()
def test_packed_attention_in_bfloat16():
    if is_slow(torch.bfloat16):
        pytest.skip("this CPU has no instructions for bfloat16, and oneDNN packs nothing")
    _, exact = packed_attention()
    attention, x = copy.deepcopy(exact).bfloat16(), torch.randn(2, 7, 48).bfloat16()
    PackedAttention.take_over(attention)
    assert attention._is_packed_for(x, projections(attention))
    expected = exact(x.double())[0]
    assert (attention(x)[0].double() - expected).norm() < 0.02 * expected.norm()


@torch.no_grad()
def test_packed_attention_of_fewer_heads():
    """As where heads of keys and values are shared by several of the queries'."""
    attention, exact = packed_attention()
    for each in (attention, exact):
        each.num_key_value_groups = 2
        for layer in (each.k_proj, each.v_proj):
            layer.weight = torch.nn.Parameter(layer.weight[:24])
            layer.bias = torch.nn.Parameter(layer.bias[:24])
    attention.packed = Packed(tuple(layer.weight for layer in projections(attention)))
    x = torch.randn(2, 7, 48)
    assert attention._is_packed_for(x, projections(attention))
    torch.testing.assert_close(attention(x)[0].double(), exact(x.double())[0], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_layers_of_others_are_not_packed():
    model = random_model(ScratchGPTForCausalLM).eval()
    ids = random_ids(2, 9)
    first, second, _ = (block.self_attn for block in model.model.layers)
    first.k_proj = torch.nn.Sequential(first.k_proj)
    second.q_proj.bias = None
    expected = model(ids).logits
    model = optimize_for_generation(model)
    assert {type(each).__name__ for each in (first, second)} == {"MultiHeadAttention"}
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_which_attention_is_packed():
    model = optimize_for_generation(random_model(ScratchGPTForCausalLM).eval())
    kinds = [type(block.self_attn).__name__ for block in model.model.layers]
    assert kinds == ["PackedAttention"] * 3
    small = optimize_for_generation(random_model(ScratchGPTForCausalLM).eval(), weights="int8")
    assert {type(b.self_attn).__name__ for b in small.model.layers} == {"MultiHeadAttention"}


@torch.no_grad()
def test_padded_texts_in_bfloat16():
    model = random_model(ScratchGPTForCausalLM).eval().to(torch.bfloat16)
    ids = random_ids(3, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    exact = copy.deepcopy(model).float()(ids, attention_mask=mask).logits
    fast = optimize_for_generation(model)(ids, attention_mask=mask).logits
    is_real = mask.bool()
    assert (fast - exact)[is_real].abs().max() < 0.03 * exact.std()
