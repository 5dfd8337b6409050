"""oneDNN's GELU is torch's."""

import pytest
import torch
from torch.backends import mkldnn
from torch.nn import functional as F

from hf_scratch_gpt.engine import onednn as onednn_scratch_gpt
from hf_scratch_gpt.engine.half import is_slow
from hf_scratch_gpt.engine.onednn import apply_gelu

pytestmark = pytest.mark.skipif(not mkldnn.is_available(), reason="no oneDNN")
EDGES = (0.0, -0.0, 1e-30, -5.0, -10.0, -100.0, 50.0, 1e30, -1e30, 3e38, torch.inf, torch.nan)


@pytest.fixture
def calls(monkeypatch):
    """One entry for each question that is answered by oneDNN, however few the numbers."""
    taken, fits = [], onednn_scratch_gpt._fits_onednn
    if not onednn_scratch_gpt._HAS_WIDE_VECTORS:
        pytest.skip("oneDNN's is not ahead on this CPU")
    monkeypatch.setattr(onednn_scratch_gpt, "_ENOUGH", 0)
    monkeypatch.setattr(onednn_scratch_gpt, "_CHANNELS", 1)
    monkeypatch.setattr(
        onednn_scratch_gpt, "_fits_onednn", lambda x: fits(x) and (taken.append(1) or True)
    )
    return taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7,), (1, 1), (5, 12), (2, 3, 100), (2, 40, 768)], ids=str)
@torch.no_grad()
def test_gelu(calls, dtype, shape):
    if is_slow(dtype):
        pytest.skip("this CPU has no instructions for bfloat16")
    x = (3 * torch.randn(shape)).to(dtype)
    y = apply_gelu(x, "tanh")
    assert calls
    assert y.dtype == dtype
    assert y.shape == shape
    assert y.is_contiguous()
    exact = F.gelu(x.double(), approximate="tanh")
    digits = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y.double(), exact, rtol=digits, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_gelu_of_extremes(calls, dtype):
    if is_slow(dtype):
        pytest.skip("this CPU has no instructions for bfloat16")
    x = torch.tensor([EDGES, EDGES]).to(dtype)
    y, expected = apply_gelu(x, "tanh"), F.gelu(x, approximate="tanh")
    assert calls
    torch.testing.assert_close(y, expected, equal_nan=True)


OTHERS = {
    "the exact function": lambda x: (x, "none"),
    "half precision": lambda x: (x.half(), "tanh"),
    "float64": lambda x: (x.double(), "tanh"),
    "strided": lambda x: (x[:, ::2], "tanh"),
    "on another device": lambda x: (x.to("meta"), "tanh"),
}


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_what_is_left_to_torch(calls, name):
    x, form = OTHERS[name](torch.randn(4, 6))
    y, expected = apply_gelu(x, form), F.gelu(x, approximate=form)
    assert y.shape == expected.shape
    assert y.is_meta or torch.equal(y, expected)
    assert not calls


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@torch.no_grad()
def test_what_traces_or_maps_sees_torchs(calls):
    x = torch.randn(4, 6)

    class Module(torch.nn.Module):
        def forward(self, x):
            return apply_gelu(x, "tanh")

    with pytest.warns(UserWarning, match="prototype"):
        nested = torch.nested.nested_tensor([x, x[:3]])
    torch.testing.assert_close(apply_gelu(nested, "tanh")[0], F.gelu(x, approximate="tanh"))
    for traced in (
        torch.export.export(Module(), (x,)).module(),
        torch.jit.trace(Module(), x, check_trace=False),
        torch.func.vmap(Module()),
        torch.compile(Module(), backend="eager", fullgraph=True),
    ):
        torch.testing.assert_close(traced(x), F.gelu(x, approximate="tanh"))
    assert not calls


def test_in_inference_mode(calls):
    with torch.inference_mode():
        x = torch.randn(4, 6)
        torch.testing.assert_close(apply_gelu(x, "tanh"), F.gelu(x, approximate="tanh"))
    assert calls


def test_gradients_are_torchs(calls):
    x = torch.randn(4, 6, requires_grad=True)
    (own,) = torch.autograd.grad(apply_gelu(x, "tanh").sum(), x)
    (torchs,) = torch.autograd.grad(F.gelu(x, approximate="tanh").sum(), x)
    assert torch.equal(own, torchs)
    assert not calls


@torch.no_grad()
def test_few_numbers_are_torchs(monkeypatch):
    taken, is_plain = [], onednn_scratch_gpt.is_plain
    monkeypatch.setattr(
        onednn_scratch_gpt, "is_plain", lambda x: taken.append(x.numel()) or is_plain(x)
    )
    monkeypatch.setattr(onednn_scratch_gpt, "_HAS_WIDE_VECTORS", True)
    few, many = torch.randn(512, 511), torch.randn(512, 512)
    narrow = torch.randn(2**13, 63)
    for x in (few, many, narrow):
        torch.testing.assert_close(apply_gelu(x, "tanh"), F.gelu(x, approximate="tanh"))
    assert taken == [2**18]
    mkldnn.set_flags(_enabled=False)
    try:
        assert torch.equal(apply_gelu(many, "tanh"), F.gelu(many, approximate="tanh"))
    finally:
        mkldnn.set_flags(_enabled=True)
    assert taken == [2**18]
