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


def test_attention_sees_what_it_may():
    block = randomize(MultiHeadAttention(tiny_config(), layer_idx=0))
    x = torch.randn(2, 6, 32)
    causal, weights = block(x)
    assert weights.shape == (2, 4, 6, 6)
    assert weights.triu(1).abs().max() == 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 6), **EXACT)
    assert (block(x, is_causal=False)[1] > 0).all()
    allowed = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6)
    for by_mask, alone in zip(block(x, attention_mask=allowed), (causal, weights), strict=True):
        torch.testing.assert_close(by_mask, alone)


def test_transformer_block_adds_its_sub_layers_to_the_shortcut():
    block = randomize(TransformerBlock(tiny_config(), layer_idx=0))
    x = torch.randn(2, 5, 32)
    attended = x + block.self_attn(block.input_layernorm(x))[0]
    expected = attended + block.mlp(block.post_attention_layernorm(attended))
    torch.testing.assert_close(block(x), expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["tanh", "none"])
def test_gelu_written_out_keeps_the_digits_of_halves(dtype, form):
    x = torch.linspace(-6, 6, 500, dtype=dtype)
    torch.testing.assert_close(GELU(form, fused=False)(x), GELU(form)(x), atol=1e-6, rtol=1e-2)
