"""The linear layer gives what torch's gives, wherever it takes a way of its own."""

import copy

import pytest
import torch
from torch import nn
from torch.backends import mkldnn
from torch.utils.flop_counter import FlopCounterMode

from hf_scratch_gpt import FeedForward
from hf_scratch_gpt.engine.linear import Linear, linear
from hf_scratch_gpt.engine.onednn import by_onednn
from hf_scratch_gpt.engine.own_product import own_product

from ..models import tiny_config

pytestmark = pytest.mark.usefixtures("slow_half")
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def layer(dtype=torch.float32, bias=True):
    return Linear(48, 80, bias=bias).to(dtype)


def in_float64(linear, x):
    bias = 0 if linear.bias is None else linear.bias.double()
    return x.double() @ linear.weight.double().T + bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (1, 1, 48), (3, 5, 48), (0, 48)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_eager(dtype, shape, bias):
    linear, x = layer(dtype, bias), torch.randn(shape, dtype=dtype)
    y = linear(x)
    assert y.dtype == dtype
    torch.testing.assert_close(
        y.double(), in_float64(linear, x), atol=DTYPES[dtype], rtol=DTYPES[dtype]
    )


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_compiled(dtype, rows):
    torch.compiler.reset()  # one function is not compiled any number of times
    linear, x = layer(dtype), torch.randn(1, rows, 48, dtype=dtype)
    y = torch.compile(linear, fullgraph=True, dynamic=False)(x)
    torch.testing.assert_close(
        y.double(), in_float64(linear, x), atol=DTYPES[dtype], rtol=DTYPES[dtype]
    )


def test_float64_is_exact():
    with torch.no_grad():
        linear, x = layer(torch.float64), torch.randn(1, 48, dtype=torch.float64)
        assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))


def test_not_contiguous():
    with torch.no_grad():
        linear, x = layer(), torch.randn(48, 6).T
        torch.testing.assert_close(linear(x).double(), in_float64(linear, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strided", ["weight", "bias", "weight and bias"])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_strided_parameters(dtype, rows, strided):
    linear, x = layer(dtype), torch.randn(rows, 48, dtype=dtype)
    if "bias" in strided:
        linear.bias.data = torch.randn(80, 3, dtype=dtype)[:, 1]
    if "weight" in strided:
        linear.weight.data = torch.randn(80, 96, dtype=dtype)[:, ::2]
    torch.testing.assert_close(
        linear(x).double(), in_float64(linear, x), atol=DTYPES[dtype], rtol=DTYPES[dtype]
    )


@pytest.mark.parametrize("enabled", [True, False])
@torch.no_grad()
def test_onednn_stays_as_it_was(enabled):
    one_token = torch.randn(1, 48, dtype=torch.bfloat16)
    mkldnn.set_flags(_enabled=enabled)
    try:
        layer(torch.bfloat16)(one_token)
        assert mkldnn.enabled is enabled
        broken = layer(torch.bfloat16)
        broken.bias.data = torch.randn(7, dtype=torch.bfloat16)
        with pytest.raises(RuntimeError):
            broken(one_token)
        assert mkldnn.enabled is enabled
    finally:
        mkldnn.set_flags(_enabled=True)


def test_it_starts_as_torchs_and_draws_nothing_without_numbers(monkeypatch):
    torch.manual_seed(5)
    own = layer()
    torch.manual_seed(5)
    torchs = nn.Linear(48, 80)
    assert torch.equal(own.weight, torchs.weight)
    assert torch.equal(own.bias, torchs.bias)
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda *args, **kwargs: 1 / 0)
    assert Linear(48, 80, device="meta").weight.is_meta
    with pytest.raises(ZeroDivisionError):
        layer()


@pytest.mark.parametrize("is_ahead", [True, False])
def test_gradients_are_torchs(is_ahead, monkeypatch):
    monkeypatch.setattr("hf_scratch_gpt.engine.onednn._IS_AHEAD", is_ahead)
    linear, x = layer(), torch.randn(2, 48, requires_grad=True)
    linear(x).square().sum().backward()
    own = x.grad, linear.weight.grad.clone(), linear.bias.grad.clone()
    x.grad = None
    linear.zero_grad()
    nn.functional.linear(x, linear.weight, linear.bias).square().sum().backward()
    for mine, torchs in zip(own, (x.grad, linear.weight.grad, linear.bias.grad), strict=True):
        torch.testing.assert_close(mine, torchs, atol=1e-6 * is_ahead, rtol=1e-5 * is_ahead)


@torch.no_grad()
def test_autocast_still_casts():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer()(torch.randn(2, 48)).dtype == torch.bfloat16


@torch.no_grad()
def test_operations_are_counted():
    with FlopCounterMode(display=False) as counter:
        layer()(torch.randn(3, 48))
    assert counter.get_total_flops() == 2 * 3 * 48 * 80


@torch.no_grad()
def test_vmap_and_export():
    linear, x = layer(), torch.randn(4, 48)
    torch.testing.assert_close(torch.func.vmap(linear)(x), linear(x))
    exported = torch.export.export(linear, (x,)).module()
    torch.testing.assert_close(exported(x), linear(x))
    names = {str(node.target) for node in torch.export.export(linear, (x,)).graph.nodes}
    assert not any("mkldnn" in name for name in names)  # it runs on other machines too


def by_torch(x, weight, bias, gelu):
    """What autocast makes of torch's own functions."""
    if gelu is not None:
        x = nn.functional.gelu(x.to(torch.get_autocast_dtype("cpu")), approximate=gelu)
    return nn.functional.linear(x, weight, bias)


@pytest.mark.parametrize("gelu", [None, "tanh", "none"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (2, 48), (2, 700, 48), (0, 48)], ids=str)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_training_under_autocast(narrow, shape, bias, gelu, monkeypatch):
    # 1,400 rows in 3 pieces
    monkeypatch.setattr("hf_scratch_gpt.engine.own_product._ROWS", 600)
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


def test_autocast_keeps_no_copy_of_the_weight():
    linear, kept = layer(), []
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        linear(torch.randn(3, 48))
    assert {(tuple(t.shape), t.dtype) for t in kept} == {
        ((3, 48), torch.bfloat16),
        ((80, 48), torch.float32),
    }
    assert any(t.data_ptr() == linear.weight.data_ptr() for t in kept)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_frozen_parts_get_no_gradient_under_autocast(frozen):
    linear, x = layer(), torch.randn(3, 48, requires_grad=True)
    parts = {"x": x, "weight": linear.weight, "bias": linear.bias}
    parts[frozen].requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own_product(x, linear.weight, linear.bias, gelu="tanh").sum().backward()
    assert {name for name, part in parts.items() if part.grad is None} == {frozen}


@pytest.mark.parametrize("gelu", [None, "tanh"])
def test_gradients_under_autocast_can_be_differentiated(gelu):
    linear, start, results = layer(), torch.randn(3, 48), []
    for function in (own_product, by_torch):
        x = start.clone().requires_grad_()
        linear.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = function(x, linear.weight, linear.bias, gelu)
        (slope,) = torch.autograd.grad((y.float() ** 2).sum(), x, create_graph=True)
        slope.square().sum().backward()
        results.append([x.grad, linear.weight.grad])
    for own, torchs in zip(*results, strict=True):
        assert (own - torchs).norm() <= 0.02 * torchs.norm()


def test_autocast_compiled(slow_half):
    linear, x = layer(), torch.randn(3, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = linear(x), torch.compile(linear, fullgraph=True)(x)
    for y in results:
        torch.testing.assert_close(y.double(), in_float64(linear, x), atol=2e-2, rtol=2e-2)
    if not slow_half:  # else the weights were not rounded before they were multiplied
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("gelu", [None, "tanh"])
@pytest.mark.parametrize("kind", DTYPES, ids=str)
def test_training_without_autocast(kind, gelu):
    """A model that is in half precision itself, or in float32."""
    linear, start, results = layer(kind), torch.randn(700, 48).to(kind), []
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
        tolerance = 1e-6 if kind == torch.float32 else 0.01
        assert (own.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("is_ahead", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_training_in_float32(bias, is_ahead, monkeypatch):
    """GELU's output is not kept; where oneDNN is ahead, it multiplies."""
    calls, kept = [], []
    monkeypatch.setattr("hf_scratch_gpt.engine.onednn._IS_AHEAD", is_ahead)
    monkeypatch.setattr(
        "hf_scratch_gpt.engine.own_product.by_onednn",
        lambda *args: calls.append(1) or by_onednn(*args),
    )
    block = FeedForward(tiny_config(hidden_dropout=0.0)).train()
    if not bias:
        block.down_proj.bias = None
    x = torch.randn(2, 9, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = block(x)
    y.square().sum().backward()
    exact, exact_x = copy.deepcopy(block).double(), x.detach().double().requires_grad_()
    exact.zero_grad()
    exact(exact_x).square().sum().backward()
    pairs = zip([x, *block.parameters()], [exact_x, *exact.parameters()], strict=True)
    for own, expected in pairs:
        torch.testing.assert_close(own.grad.double(), expected.grad, atol=1e-6, rtol=1e-5)
    inner = {t.data_ptr() for t in kept if t.shape[-1] == 4 * 32 and t.numel() == 18 * 4 * 32}
    assert len(inner) == 1
    assert not y._is_view()
    assert len(calls) == (2 if is_ahead else 0)


@pytest.mark.parametrize("is_ahead", [True, False])
@pytest.mark.parametrize("narrow", [torch.bfloat16, None], ids=str)
def test_a_product_can_be_changed_in_place(narrow, is_ahead, monkeypatch):
    """As hooks that steer a model do."""
    monkeypatch.setattr("hf_scratch_gpt.engine.onednn._IS_AHEAD", is_ahead)
    linear_layer, x = layer(), torch.randn(2, 5, 48)
    with torch.autocast("cpu", dtype=narrow, enabled=narrow is not None):
        y = linear_layer(x)
    y += 1
    y.sum().backward()
    expected = x.sum((0, 1)).expand(80, 48)
    torch.testing.assert_close(linear_layer.weight.grad, expected, atol=0.1, rtol=2e-2)


@pytest.mark.parametrize("is_ahead", [True, False])
@pytest.mark.parametrize("broken", ["bias of one", "sparse weight"])
def test_training_with_what_torch_alone_can_do(broken, is_ahead, monkeypatch):
    monkeypatch.setattr("hf_scratch_gpt.engine.onednn._IS_AHEAD", is_ahead)
    block = FeedForward(tiny_config(hidden_dropout=0.0)).train()
    x, down = torch.randn(2, 9, 32), block.down_proj
    inner = nn.functional.gelu(block.up_proj(x), approximate="tanh")
    if broken == "bias of one":
        down.bias = nn.Parameter(torch.randn(1))
        expected = inner @ down.weight.T + down.bias
    else:
        expected = inner @ down.weight.T + down.bias
        down.weight = nn.Parameter(down.weight.detach().to_sparse(), requires_grad=False)
    y = block(x)
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-5)
    y.sum().backward()
    of_bias = torch.full_like(down.bias, y.numel() / len(down.bias))
    torch.testing.assert_close(down.bias.grad, of_bias)


@torch.no_grad()
def test_evaluation_under_autocast():
    linear, x = layer(), torch.randn(5, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), in_float64(linear, x), atol=2e-2, rtol=2e-2)


@torch.no_grad()
def test_half_precision_in_pieces(slow_half, monkeypatch):
    """No more of a matrix is in float32 at a time than is good for the cache."""
    monkeypatch.setattr("hf_scratch_gpt.engine.linear._PIECE", 1000)
    monkeypatch.setattr("hf_scratch_gpt.engine.onednn._IS_AHEAD", True)
    monkeypatch.setattr("hf_scratch_gpt.engine.onednn.HAS_MATRIX_UNIT", False)
    linear, x, calls = layer(torch.bfloat16), torch.randn(5, 48).bfloat16(), []
    monkeypatch.setattr(
        "hf_scratch_gpt.engine.linear.by_onednn",
        lambda x, weight, bias: (
            calls.append(weight.numel()) or nn.functional.linear(x, weight, bias)
        ),
    )
    y = linear(x)
    assert calls == ([960] * 4 if slow_half else [])
    torch.testing.assert_close(y.double(), in_float64(linear, x), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 6])
@torch.no_grad()
def test_a_layer_without_numbers_is_an_error(dtype, rows):
    with pytest.raises((RuntimeError, NotImplementedError)):
        layer(dtype).to("meta")(torch.randn(rows, 48, dtype=dtype)).sum().item()


@pytest.mark.parametrize("shape", [(1,), (1, 80), (5, 80)], ids=str)
@torch.no_grad()
def test_a_bias_of_another_shape(shape):
    linear_layer, x = layer(), torch.randn(5, 48)
    bias = torch.randn(shape)
    expected = nn.functional.linear(x, linear_layer.weight, bias)
    torch.testing.assert_close(linear(x, linear_layer.weight, bias), expected)


@torch.no_grad()
def test_a_sparse_weight():
    weight, x = torch.randn(80, 48).relu(), torch.randn(5, 48)
    product = linear(x, weight.to_sparse(), None)
    torch.testing.assert_close(product, x @ weight.T)


@torch.no_grad()
def test_onednn_keeps_its_precision():
    mkldnn.set_flags(_fp32_precision="bf16")
    try:
        layer(torch.bfloat16)(torch.randn(1, 48, dtype=torch.bfloat16))
        assert mkldnn.matmul.fp32_precision == "bf16"
    finally:
        mkldnn.set_flags(_fp32_precision="none")


@pytest.mark.parametrize("is_ahead", [True, False])
@torch.no_grad()
def test_the_same_whichever_is_ahead(is_ahead, monkeypatch):
    """MKL is asked on some processors, oneDNN on others."""
    monkeypatch.setattr("hf_scratch_gpt.engine.onednn._IS_AHEAD", is_ahead)
    linear_layer = layer()
    for rows in (1, 6):
        x = torch.randn(rows, 48)
        close = {"atol": 1e-6, "rtol": 1e-5}
        torch.testing.assert_close(linear_layer(x).double(), in_float64(linear_layer, x), **close)


@pytest.mark.parametrize("has_unit", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (1, 1, 48)], ids=str)
@torch.no_grad()
def test_a_vector_with_and_without_a_matrix_unit(has_unit, bias, shape, monkeypatch):
    monkeypatch.setattr("hf_scratch_gpt.engine.linear.HAS_MATRIX_UNIT", has_unit)
    linear_layer, x = layer(torch.bfloat16, bias=bias), torch.randn(shape).bfloat16()
    y = linear_layer(x)
    assert y.shape == (*shape[:-1], 80)
    assert y.dtype == torch.bfloat16
    exact = in_float64(linear_layer, x)
    torch.testing.assert_close(y.double(), exact, atol=1e-3, rtol=2**-8)


@pytest.mark.parametrize("has_unit", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_many_vectors_with_and_without_a_matrix_unit(has_unit, bias, monkeypatch):
    if has_unit and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN multiplies no bfloat16 on this CPU")
    monkeypatch.setattr("hf_scratch_gpt.engine.onednn.HAS_MATRIX_UNIT", has_unit)
    linear_layer, x = layer(torch.bfloat16, bias=bias), torch.randn(2, 40, 48).bfloat16()
    y = linear_layer(x)
    assert y.dtype == torch.bfloat16
    exact = in_float64(linear_layer, x)
    torch.testing.assert_close(y.double(), exact, atol=2e-3, rtol=2**-8)


@torch.no_grad()
def test_without_onednn_it_is_not_called(monkeypatch):
    monkeypatch.setattr("hf_scratch_gpt.engine.onednn._IS_AHEAD", True)
    monkeypatch.setattr("hf_scratch_gpt.engine.linear.by_onednn", lambda *args: 1 / 0)
    x = torch.randn(6, 48)
    mkldnn.set_flags(_enabled=False)
    try:
        assert layer()(x).shape == (6, 80)
    finally:
        mkldnn.set_flags(_enabled=True)
    with pytest.raises(ZeroDivisionError):
        layer()(x)


@pytest.mark.parametrize("gelu", [None, "tanh"])
@pytest.mark.parametrize(("dtype", "autocast"), [(0, True), (1, False), (0, False)])
def test_several_gradients_at_once(gelu, dtype, autocast):
    linear_layer = layer([torch.float32, torch.bfloat16][dtype])
    x = torch.randn(3, 48, dtype=linear_layer.weight.dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = own_product(x, linear_layer.weight, linear_layer.bias, gelu).sum(1)
    many = torch.eye(3, dtype=y.dtype)
    (at_once,) = torch.autograd.grad(y, x, many, is_grads_batched=True, retain_graph=True)
    (mapped,) = torch.vmap(lambda each: torch.autograd.grad(y, x, each, retain_graph=True))(many)
    torch.testing.assert_close(mapped, at_once)
    for row, gradient in zip(many, at_once, strict=True):
        (alone,) = torch.autograd.grad(y, x, row, retain_graph=True)
        torch.testing.assert_close(gradient, alone, atol=2e-2, rtol=2e-2)


def test_a_frozen_weight_keeps_no_input():
    linear_layer, kept = layer(), []
    linear_layer.weight.requires_grad_(False)
    x = torch.randn(7, 48, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        y = linear_layer(x)
    assert kept == [(80, 48)]
    y.float().sum().backward()
    expected = linear_layer.weight.sum(0).expand(7, 48)
    torch.testing.assert_close(x.grad, expected, atol=0.1, rtol=2e-2)


def test_hooks_on_all_modules_see_all_modules():
    block = FeedForward(tiny_config()).train()
    seen = []
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(type(module).__name__)
    )
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            block(torch.randn(2, 32, requires_grad=True))
    finally:
        hook.remove()
    assert seen == ["Linear", "GELU", "Linear", "Dropout", "FeedForward"]
