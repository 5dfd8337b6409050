"""Layers that are packed or in int8 give what those they replace give."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hf_scratch_gpt import FeedForward, ScratchGPTConfig
from hf_scratch_gpt.engine import half, packing
from hf_scratch_gpt.engine.half import is_slow
from hf_scratch_gpt.engine.packed import Int8Linear, PackedFeedForward, PackedLinear
from hf_scratch_gpt.engine.swap import _before_class

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def exchange(module, faster):
    module.__class__ = _before_class(faster, type(module))
    if hasattr(module, "prepare"):
        module.prepare()
    return module


def layer(dtype=torch.float32, bias=True, faster=PackedLinear):
    return exchange(torch.nn.Linear(48, 83, bias=bias).to(dtype), faster)


def in_float64(linear, x):
    bias = 0 if linear.bias is None else linear.bias.double()
    return x.double() @ linear.weight.double().T + bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (1, 1, 48), (3, 5, 48), (0, 48), (205, 48)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_product(dtype, shape, bias):
    linear, x = layer(dtype, bias), torch.randn(shape, dtype=dtype)
    y = linear(x)
    assert y.dtype == dtype
    close = dict(atol=DTYPES[dtype], rtol=DTYPES[dtype])
    torch.testing.assert_close(y.double(), in_float64(linear, x), **close)


@pytest.mark.parametrize("is_ahead", [True, False])
@pytest.mark.parametrize("rows", [3, 5])
@torch.no_grad()
def test_slow_half_precision_in_pieces(monkeypatch, rows, is_ahead):
    monkeypatch.setattr(half, "_SLOW_DTYPES", frozenset([torch.bfloat16]))
    monkeypatch.setattr(half, "_IS_AHEAD", is_ahead)
    monkeypatch.setattr(half, "_PIECE", 1000)
    linear, x = layer(torch.bfloat16), torch.randn(rows, 48).bfloat16()
    torch.testing.assert_close(linear(x).double(), in_float64(linear, x), atol=2e-2, rtol=2e-2)


@torch.no_grad()
def test_what_is_left_to_torch():
    """What traces, watches or casts sees torch's product; so do gradients and strided weights."""
    linear, x = layer(), torch.randn(4, 48)
    expected = in_float64(linear, x).float()
    assert linear.by_packed(x) is not None
    with FlopCounterMode(display=False) as counter:
        linear(x)
    assert counter.get_total_flops() == 2 * 4 * 48 * 83
    exported = torch.export.export(linear, (x,))
    assert not any("mkldnn" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), expected)
    torch.testing.assert_close(torch.compile(linear, backend="eager", fullgraph=True)(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16
    with torch.enable_grad():
        linear(x).sum().backward()
    torch.testing.assert_close(linear.weight.grad, x.sum(0).expand(83, 48))
    linear.bias.data = torch.randn(83, 3)[:, 1]
    torch.testing.assert_close(linear(x).double(), in_float64(linear, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [PackedLinear, Int8Linear])
@pytest.mark.parametrize("form", ["gelu", "gelu_new"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_feed_forward(dtype, form, kind):
    config = ScratchGPTConfig(n_embd=48, n_head=4, activation_function=form)
    mlp = FeedForward(config).eval().to(dtype)
    mlp.up_proj.weight.mul_(20)  # so that the forms of GELU differ
    x = torch.randn(2, 5, 48, dtype=dtype)
    exact = copy.deepcopy(mlp).double()(x.double())
    for part in (mlp.up_proj, mlp.down_proj):
        exchange(part, kind)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    close = dict(atol=tolerance, rtol=tolerance)
    if kind is Int8Linear:  # whose second layer may round its input the other way
        up = mlp.up_proj(x).double()
        inner = F.gelu(up, approximate="tanh" if form == "gelu_new" else "none")
        fused = mlp.up_proj.by_packed(x, mlp.activation.form)
        if fused is None:  # the processor multiplies bfloat16
            fused = inner.to(dtype)
        torch.testing.assert_close(fused.double(), inner, **close)
        exact = mlp.down_proj(fused).double()
    exchange(mlp, PackedFeedForward)
    torch.testing.assert_close(mlp(x).double(), exact, **close)
    mlp.activation.register_forward_hook(lambda module, args, output: 0 * output)
    assert torch.equal(mlp(x), mlp.down_proj(torch.zeros(2, 5, 192, dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_int8_turned_back_in_pieces(monkeypatch, dtype):
    monkeypatch.setattr("hf_scratch_gpt.engine.packed._PIECE", 1000)
    linear = torch.nn.Linear(47, 100).to(dtype)
    linear.weight[7] = 0
    exact = copy.deepcopy(linear)
    exchange(linear, Int8Linear)
    assert linear.weight.dtype == torch.int8
    rebuilt = linear.weight * linear.weight_scale[:, None]
    assert ((rebuilt - exact.weight).abs() <= 0.5001 * linear.weight_scale[:, None]).all()
    x = torch.randn(2, 3, 47).to(dtype)
    expected = (x.float() @ rebuilt.T.float() + linear.bias.float()).to(dtype)
    # The vectors are rounded to 15 bits, by half a unit of the last one at most.
    unit = x.float().abs().amax(-1, keepdim=True) / 32767
    bound = 0.51 * unit * rebuilt.float().abs().sum(1) + (1e-5 if dtype == torch.float32 else 2e-2)
    assert ((linear(x) - expected).abs() <= bound).all()


@pytest.mark.usefixtures("slow_half")
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_int8_in_half_precision(kind):
    """In float16 a product without its scale would overflow."""
    linear = torch.nn.Linear(3072, 8).to(kind)
    linear.weight.copy_(torch.rand(8, 3072) * 0.02)
    x, exact = torch.full((1, 3072), 2.0).to(kind), copy.deepcopy(linear).float()
    y = exchange(linear, Int8Linear)(x)
    assert y.dtype == kind
    torch.testing.assert_close(y.float(), exact(x.float()), atol=0.1, rtol=0.01)


@pytest.mark.skipif(not half.IS_X86, reason="torch's private answer is asked for x86 only")
def test_which_types_are_slow_is_what_onednn_says():
    """`_is_mkldnn_bf16_supported` and its sibling are private; the engine asks what is public."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    assert {dtype: not is_slow(dtype) for dtype in supported} == supported


@pytest.mark.parametrize("has_large_pages", [True, False])
def test_memory_in_large_pages_is_torchs_own_to_use(has_large_pages, monkeypatch):
    if not has_large_pages:  # as a kernel without them says
        monkeypatch.setattr("mmap.MADV_HUGEPAGE", -1, raising=False)
    for shape in ((3, 2**20), (2, 3)):
        memory = packing.empty_in_large_pages(*shape, dtype=torch.float32)
        assert (memory.shape, memory.dtype, memory.device.type) == (shape, torch.float32, "cpu")
        assert memory.fill_(2).sum() == 2 * memory.numel()
