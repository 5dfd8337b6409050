"""Each block against the formula of its paper, computed another way in float64."""

import math

import pytest
import torch
from torch import nn

from hf_scratch_gpt import GELU, FeedForward, LayerNorm, MultiHeadAttention, TransformerBlock

from ..models import randomize, tiny_config

EXACT = dict(atol=1e-12, rtol=0)


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("fused", [True, False])
def test_layer_norm_has_mean_zero_and_variance_one(fused):
    x = torch.randn(2, 5, 16) * 7 + 3
    y = LayerNorm(16, eps=1e-14, fused=fused)(x)
    torch.testing.assert_close(y.mean(-1), torch.zeros(2, 5), **EXACT)
    torch.testing.assert_close(y.pow(2).mean(-1), torch.ones(2, 5), **EXACT)


@pytest.mark.parametrize("fused", [True, False])
def test_layer_norm_equals_torchs(fused):
    x = torch.randn(2, 5, 16)
    ours, theirs = randomize(LayerNorm(16, eps=1e-3, fused=fused)), nn.LayerNorm(16, eps=1e-3)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layer_norm_of_large_halves(dtype):
    x = torch.randn(3, 768).to(dtype)
    x[:, 5] = 3000  # its square is past float16's range, and such values occur in GPT-2
    kernel, written_out = (LayerNorm(768, fused=fused).to(dtype)(x) for fused in (True, False))
    assert written_out.dtype == dtype
    torch.testing.assert_close(written_out, kernel)


@pytest.mark.parametrize("fused", [True, False])
def test_gelu_follows_its_formulas(fused):
    xs = [-4.0, -1.0, -0.1, 0.0, 0.3, 1.0, 5.0]
    exact = [x * 0.5 * math.erfc(-x / math.sqrt(2)) for x in xs]
    tanh = [0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) for x in xs]
    x = torch.tensor(xs)
    torch.testing.assert_close(GELU("none", fused)(x), torch.tensor(exact), **EXACT)
    torch.testing.assert_close(GELU("tanh", fused)(x), torch.tensor(tanh), **EXACT)


def test_feed_forward_is_two_matrices_around_gelu():
    block = randomize(FeedForward(tiny_config()))
    x = torch.randn(2, 5, 32)
    wide = x @ block.up_proj.weight.T + block.up_proj.bias
    assert wide.shape == (2, 5, 128)
    expected = GELU(fused=False)(wide) @ block.down_proj.weight.T + block.down_proj.bias
    torch.testing.assert_close(block(x), expected, **EXACT)


def attention_by_loops(block: MultiHeadAttention, x: torch.Tensor) -> torch.Tensor:
    """Causal attention for one row x (T, C), a token and a head at a time."""
    queries, keys, values = block.q_proj(x), block.k_proj(x), block.v_proj(x)
    gathered = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for start in range(0, x.shape[1], block.head_dim):
            head = slice(start, start + block.head_dim)
            scores = [
                float(queries[token, head] @ keys[other, head]) / math.sqrt(block.head_dim)
                for other in range(token + 1)
            ]
            exponentials = [math.exp(score) for score in scores]
            for other, exponential in enumerate(exponentials):
                share = exponential / sum(exponentials)
                gathered[token, head] += share * values[other, head]
    return block.o_proj(gathered)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_equals_the_formula(implementation):
    config = tiny_config()
    config._attn_implementation = implementation
    block = randomize(MultiHeadAttention(config, layer_idx=0))
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        output, _ = block(x)
        expected = torch.stack([attention_by_loops(block, row) for row in x])
    torch.testing.assert_close(output, expected, **EXACT)


def test_attention_alone_is_causal_and_weights_sum_to_one():
    block = randomize(MultiHeadAttention(tiny_config(), layer_idx=0))
    _, weights = block(torch.randn(1, 6, 32))
    assert weights.shape == (1, 4, 6, 6)
    assert weights.triu(1).abs().max() == 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 6), **EXACT)


def test_attention_may_see_everything_when_told_so():
    block = randomize(MultiHeadAttention(tiny_config(), layer_idx=0))
    _, weights = block(torch.randn(1, 6, 32), is_causal=False)
    assert (weights > 0).all()


def test_scaling_switches():
    plain = MultiHeadAttention(tiny_config(), layer_idx=2)
    by_layer = MultiHeadAttention(tiny_config(scale_attn_by_inverse_layer_idx=True), layer_idx=2)
    unscaled = MultiHeadAttention(tiny_config(scale_attn_weights=False), layer_idx=2)
    assert plain.scaling == 8**-0.5
    assert by_layer.scaling == plain.scaling / 3
    assert unscaled.scaling == 1


def test_transformer_block_adds_its_sub_layers_to_the_shortcut():
    block = randomize(TransformerBlock(tiny_config(), layer_idx=0))
    x = torch.randn(2, 5, 32)
    attended = x + block.self_attn(block.input_layernorm(x))[0]
    expected = attended + block.mlp(block.post_attention_layernorm(attended))
    torch.testing.assert_close(block(x), expected, **EXACT)


def test_gradients_of_written_out_blocks_are_those_of_the_kernels():
    results = []
    for fused, implementation in [(True, "sdpa"), (False, "eager")]:
        torch.manual_seed(0)
        config = tiny_config(fused_kernels=fused)
        config._attn_implementation = implementation
        block = randomize(TransformerBlock(config, layer_idx=0))
        x = torch.randn(2, 9, 32, requires_grad=True)
        y = block(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in block.parameters())])
    for kernel, written_out in zip(*results, strict=True):
        torch.testing.assert_close(kernel, written_out, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["tanh", "none"])
def test_gelu_written_out_keeps_the_digits_of_halves(dtype, form):
    x = torch.linspace(-6, 6, 500, dtype=dtype)
    torch.testing.assert_close(GELU(form, fused=False)(x), GELU(form)(x), atol=1e-6, rtol=1e-2)


def test_a_mask_of_yes_and_no():
    attention = MultiHeadAttention(tiny_config(), 0).eval()
    x = torch.randn(2, 6, 32)
    allowed = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6)
    expected, weights = attention(x)
    own, own_weights = attention(x, attention_mask=allowed)
    torch.testing.assert_close(own, expected)
    torch.testing.assert_close(own_weights, weights)
