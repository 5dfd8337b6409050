"""What torch has of oneDNN, and what of its own, where it would choose the slower one."""

# C length of an input vector, D of an output vector

import torch
from torch.backends import mkldnn
from torch.nn import functional as F

from .half import HAS_MATRIX_UNIT, is_slow
from .plain import is_plain

# torch multiplies float32 by MKL, which is at its best on processors of its maker's.
_CPU = torch.cpu.get_capabilities().get("cpu_name", "")
_IS_AHEAD = mkldnn.is_available() and not _CPU.startswith("Intel")
# torch's own GELU has done fewer numbers sooner, and those of fewer channels.
_ENOUGH, _CHANNELS = 2**18, 64
# Without instructions for 16 numbers at once, which is AVX-512, oneDNN's is not ahead.
_HAS_WIDE_VECTORS: bool = torch.cpu.get_capabilities().get("avx512_f", False)


def by_onednn(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: str | None = None
) -> torch.Tensor:
    """The product of `x` (..., C) and `weight` (D, C), which may be packed, by oneDNN.

    `gelu` is a form of GELU, "tanh" or "none", to be applied to it.
    """
    if bias is not None:
        bias = bias.contiguous()  # another is read as if it were
    after, form = ("none", "") if gelu is None else ("gelu", gelu)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, after, [], form)


def is_onednn_ahead(x: torch.Tensor) -> bool:
    """Whether oneDNN multiplies `x` (..., C) by a matrix (D, C) faster than torch's choice does."""
    return _IS_AHEAD and x.dtype == torch.float32 and x.is_cpu and bool(mkldnn.enabled)


def adds_bias_apart(x: torch.Tensor) -> bool:
    """Whether torch's product of `x`, a CPU's, takes long to add a bias.

    torch writes the bias first, and adds the product to it; oneDNN adds it on the way. Beside a
    matrix unit the product takes so little time that this shows.
    """
    return HAS_MATRIX_UNIT and bool(mkldnn.enabled) and x.dtype == torch.bfloat16


def without_onednn(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The product of `x` (..., C) and `weight` (D, C) by torch's own code.

    torch asks one switch of the process whether to call oneDNN, and it is off meanwhile: a thread
    that computes beside this one may miss it for that moment, which costs time and no more.
    """
    if not mkldnn.enabled:
        return F.linear(x, weight, bias)
    mkldnn.set_flags(_enabled=False, _fp32_precision=None)  # None leaves it as it is
    try:
        return F.linear(x, weight, bias)
    finally:
        mkldnn.set_flags(_enabled=True, _fp32_precision=None)


def apply_gelu(x: torch.Tensor, form: str) -> torch.Tensor:
    """GELU of each number of `x`, (..., C); `form` is "tanh" or "none", as torch calls them.

    torch computes tanh to the last digit of float32, in most of the time that GELU takes. oneDNN's
    way takes less than half of it, and is off by no more; but torch offers that with a product
    only. So each number is multiplied by one: a convolution of a single point, each of C channels
    by itself.
    """
    if form != "tanh" or not _fits_onednn(x):
        return F.gelu(x, approximate=form)
    channels = x.shape[-1]
    ones = torch.ones(channels, 1, 1, 1, dtype=x.dtype, device="cpu")
    points = x.view(1, -1, 1, channels).permute(0, 3, 1, 2)  # (1, C, N, 1), as they lie
    padding, stride, dilation = [0, 0], [1, 1], [1, 1]
    result = torch.ops.mkldnn._convolution_pointwise(
        points, ones, None, padding, stride, dilation, channels, "gelu", [], form
    )
    return result.permute(0, 2, 3, 1).reshape(x.shape)


def _fits_onednn(x: torch.Tensor) -> bool:
    """Whether oneDNN may have `x`, which is large enough: it knows no gradients."""
    return (
        _HAS_WIDE_VECTORS
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # to which the next would be a number that varies
        and x.numel() >= _ENOUGH
        and x.is_cpu
        and not x.is_nested
        and x.shape[-1] >= _CHANNELS
        and x.is_contiguous()
        and x.dtype in (torch.float32, torch.bfloat16)
        and not is_slow(x.dtype)
        and mkldnn.is_available()
        and bool(mkldnn.enabled)
        and not torch.is_grad_enabled()
        and is_plain(x)
    )
