"""Linear layers that are packed or in int8 give what those they replace give."""

import copy

import pytest
import torch

from hf_scratch_gpt.engine import packed as fast_linear
from hf_scratch_gpt.engine.half import HAS_MATRIX_UNIT
from hf_scratch_gpt.engine.linear import Linear
from hf_scratch_gpt.engine.packed import Int8Linear, PackedLinear


@pytest.fixture
def turns_back(monkeypatch):
    """A CPU without products of int8."""
    monkeypatch.setattr(fast_linear, "_multiplies_integers", lambda: False)


@pytest.fixture
def multiplies_integers(monkeypatch):
    """A CPU with them; torch's are exact on all, if slow on some, but where oneDNN's lose sums."""
    largest = torch.full((64, 64), 127, dtype=torch.int8)
    if not (torch._int_mm(largest, largest) == 64 * 127**2).all():
        pytest.skip("oneDNN's sums of int8 have no room on this CPU")
    monkeypatch.setattr(fast_linear, "_multiplies_integers", lambda: True)


@torch.no_grad()
def test_copies_share_what_is_packed():
    layer, x = Linear(48, 80), torch.randn(3, 48)
    PackedLinear.take_over(layer)
    copied = copy.deepcopy(layer)
    assert copied.packed.weight is layer.packed.weight
    assert layer.is_packed_for(x)
    assert copied.is_packed_for(x)
    copied.weight.mul_(2)
    assert layer.is_packed_for(x)
    assert not copied.is_packed_for(x)
    assert not copy.deepcopy(copied).is_packed_for(x)
    torch.testing.assert_close(copied(x) - copied.bias, 2 * (layer(x) - layer.bias))


@torch.no_grad()
def test_int8_turned_back_in_pieces(turns_back, monkeypatch):
    monkeypatch.setattr("hf_scratch_gpt.engine.packed._PIECE", 1000)
    layer = torch.nn.Linear(48, 100)
    layer.weight[7] = 0
    exact = copy.deepcopy(layer)
    Int8Linear.take_over(layer)
    assert layer.weight.dtype == torch.int8
    rebuilt = layer.weight * layer.weight_scale[:, None]
    assert ((rebuilt - exact.weight).abs() <= 0.5001 * layer.weight_scale[:, None]).all()
    x = torch.randn(2, 3, 48)
    torch.testing.assert_close(layer(x), x @ rebuilt.T + layer.bias)


@pytest.mark.usefixtures("slow_half")
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_int8_in_half_precision(turns_back, kind):
    """In float16 a product without its scale would overflow."""
    layer = torch.nn.Linear(3072, 8).to(kind)
    layer.weight.copy_(torch.rand(8, 3072) * 0.02)
    x, exact = torch.full((1, 3072), 2.0).to(kind), copy.deepcopy(layer).float()
    Int8Linear.take_over(layer)
    y = layer(x)
    assert y.dtype == kind
    torch.testing.assert_close(y.float(), exact(x.float()), atol=0.1, rtol=0.01)


def make_int8(columns=48, rows=100, dtype=torch.float32):
    """A layer, and its numbers in float64."""
    layer = torch.nn.Linear(columns, rows).to(dtype)
    Int8Linear.take_over(layer)
    exact = torch.nn.Linear(columns, rows).double()
    with torch.no_grad():
        exact.weight.copy_(layer.weight.double() * layer.weight_scale.double()[:, None])
        exact.bias.copy_(layer.bias)
    return layer, exact


def watch_products(monkeypatch):
    """One entry for each product of integers: how many vectors there were."""
    taken, multiply = [], fast_linear._by_integers
    monkeypatch.setattr(
        fast_linear,
        "_by_integers",
        lambda x, weight: taken.append(x.numel() // x.shape[-1]) or multiply(x, weight),
    )
    return taken


@pytest.mark.usefixtures("multiplies_integers")
@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 3, 48), (1, 600, 48)], ids=str)
@torch.no_grad()
def test_int8_by_integers(monkeypatch, shape):
    taken = watch_products(monkeypatch)
    layer, exact = make_int8()
    x = torch.randn(shape)
    vectors = x.view(-1, 48)
    vectors *= torch.logspace(0, 6, len(vectors))[:, None]  # each has a unit of its own
    y = layer(x)
    assert taken
    assert y.shape == (*shape[:-1], 100)
    # Each number is off by half a unit, 1 / 16,256 of its vector's largest.
    unit = x.double().abs().amax(-1, keepdim=True) / 16256
    room = unit / 2 * exact.weight.abs().sum(1) * 1.01 + 1e-5
    assert ((y.double() - exact(x.double())).abs() <= room).all()


@pytest.mark.usefixtures("multiplies_integers")
@torch.no_grad()
def test_int8_by_integers_of_a_wide_matrix_has_room():
    layer, exact = make_int8(columns=12288, rows=4)
    for sign in (1, -1):
        layer.weight.fill_(127 * sign)
        exact.weight.copy_(layer.weight * layer.weight_scale[:, None])
        x = torch.full((2, 12288), 3.0)
        torch.testing.assert_close(layer(x).double(), exact(x.double()), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("multiplies_integers")
@torch.no_grad()
def test_int8_by_integers_of_zeros_and_what_is_no_number():
    layer, exact = make_int8()
    x = torch.randn(4, 48)
    x[0], x[1, 5], x[2, 7] = 0, torch.inf, torch.nan
    y = layer(x)
    assert torch.equal(y[0], layer.bias)
    assert not y[1:3].isfinite().any()
    torch.testing.assert_close(y[3].double(), exact(x[3].double()), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("multiplies_integers")
def test_who_multiplies_integers(monkeypatch):
    taken, (layer, exact) = watch_products(monkeypatch), make_int8()
    x = torch.randn(3, 48, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(
        x.grad.double(), exact.weight.sum(0).expand(3, 48), rtol=1e-5, atol=1e-5
    )
    with torch.no_grad():
        assert layer(x[:0]).shape == (0, 100)
        wide = copy.deepcopy(layer).double()
        torch.testing.assert_close(wide(x.double()), exact(x.double()))
        exported = torch.export.export(layer, (x,)).module()
        torch.testing.assert_close(exported(x).double(), exact(x.double()), rtol=1e-4, atol=1e-5)
        mapped = torch.func.vmap(layer)(x)
        torch.testing.assert_close(mapped.double(), exact(x.double()), rtol=1e-4, atol=1e-5)
        assert not taken
        half = make_int8(dtype=torch.bfloat16)[0]
        assert half(x.bfloat16()).dtype == torch.bfloat16
        assert len(taken) == (0 if HAS_MATRIX_UNIT else 1)
        monkeypatch.setattr(fast_linear, "HAS_MATRIX_UNIT", not HAS_MATRIX_UNIT)
        assert half(x.bfloat16()).dtype == torch.bfloat16
        assert len(taken) == 1
    with torch.inference_mode():
        torch.testing.assert_close(layer(x).double(), exact(x.double()), rtol=1e-3, atol=1e-3)
    assert len(taken) == 2


@pytest.mark.usefixtures("multiplies_integers")
@torch.no_grad()
def test_a_wide_layer_is_multiplied_a_few_vectors_at_a_time(monkeypatch):
    monkeypatch.setattr(fast_linear, "_PRODUCTS", 1000)
    multiply, sizes = torch._int_mm, []
    monkeypatch.setattr(torch, "_int_mm", lambda x, y: sizes.append(len(x)) or multiply(x, y))
    layer, exact = make_int8()
    x = torch.randn(25, 48)
    torch.testing.assert_close(layer(x).double(), exact(x.double()), rtol=1e-3, atol=1e-3)
    assert sizes == [20, 20, 10]  # two digits of each


def test_what_is_compared_lies_all_over_a_weight():
    for weight in (torch.arange(5000.0).view(1000, 5), torch.arange(640.0).view(5, 128).T):
        sample = fast_linear._sample(weight)
        places = torch.stack([(weight == number).nonzero()[0] for number in sample])
        for along, size in zip(places.T.tolist(), weight.shape, strict=True):
            assert len(set(along)) == len(along) == 5
            assert max(along) >= 0.7 * size
