"""What the processor multiplies fast, and in which type and by which library it should.

Half precision without instructions for it is multiplied in float32: on an AVX2 machine a prompt of
32 tokens in bfloat16 took 144 ms in place of 420.
"""

# C length of an input vector, D of an output vector

import platform

import torch
from torch import nn
from torch.backends import mkldnn
from torch.nn import functional as F

from .private_ops import has_onednn, is_recorded, onednn_linear

_PIECE = 2**20  # numbers of a matrix that are turned into float32 at a time; a cache holds them
_FEW = 3  # so few vectors torch multiplies in half precision as fast as in float32

_HAS = torch.cpu.get_capabilities()
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
# What oneDNN needs of an x86 for each type. Without it torch multiplies at a tenth of the speed of
# float32, and some products at a hundredth.
_NEEDS = {torch.bfloat16: "avx512_bw", torch.float16: "avx512_fp16"}
_SLOW_DTYPES = frozenset(
    dtype for dtype, needed in _NEEDS.items() if IS_X86 and not _HAS.get(needed, False)
)
# Intel's AMX, which multiplies tiles of bfloat16 by one another.
_HAS_MATRIX_UNIT: bool = _HAS.get("amx_bf16", False)
# torch multiplies float32 by MKL, which is at its best on Intel's processors.
_IS_AHEAD = not _HAS.get("cpu_name", "").startswith("Intel")


def is_slow(dtype: torch.dtype) -> bool:
    """Whether the CPU has no instructions for `dtype`."""
    return dtype in _SLOW_DTYPES


def multiplied_as(dtype: torch.dtype) -> torch.dtype:
    """The type in which the CPU should multiply numbers of `dtype`."""
    return torch.float32 if is_slow(dtype) else dtype


def autocast_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that autocast on a CPU, where it is at work, makes of numbers of `dtype`."""
    is_at_work = torch.is_autocast_enabled("cpu") and dtype != torch.float64
    return torch.get_autocast_dtype("cpu") if is_at_work else dtype


def is_onednn_ahead(x: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether oneDNN multiplies `x` (..., C), on a CPU, faster than what torch would choose.

    In float32 that is so on processors that are not Intel's: 95 to 124 GFLOP/s for MKL's 60 to 78.
    Beside a matrix unit it is so in bfloat16 with a bias, which torch adds in a pass of its own:
    4.5 ms for 7.7.
    """
    is_ahead = _IS_AHEAD if x.dtype == torch.float32 else bias is not None and _HAS_MATRIX_UNIT
    has_type = x.dtype in (torch.float32, torch.bfloat16)
    return is_ahead and has_type and bool(mkldnn.enabled) and has_onednn()


def is_ordinary(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether these are torch's own dense tensors on a CPU, and nothing traces or records them.

    Others, as quantized, sparse and distributed ones, are left to torch.
    """
    return (
        not (torch.compiler.is_compiling() or torch.jit.is_tracing() or is_recorded())
        and x.is_cpu
        and weight.is_cpu
        and {type(x), type(weight)} <= {nn.Parameter, torch.Tensor}
        and weight.layout == torch.strided
        and x.shape[-1:] == weight.shape[-1:]
        and (bias is None or (bias.dtype, bias.shape) == (weight.dtype, weight.shape[:1]))
    )


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product of `x` (..., C) and `weight` (D, C), plus `bias`, without a gradient."""
    return (onednn_linear if is_onednn_ahead(x, bias) else F.linear)(x, weight, bias)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As `multiply`, in the type of `x`; half precision that is slow goes by way of float32."""
    if not is_slow(x.dtype) or x.numel() <= _FEW * x.shape[-1]:
        return multiply(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    wide, rows = x.float(), max(1, _PIECE // weight.shape[1])
    pieces = weight.split(rows)
    biases = [None] * len(pieces) if bias is None else bias.float().split(rows)
    products = [
        multiply(wide, piece.float(), of_piece).to(x.dtype)
        for piece, of_piece in zip(pieces, biases, strict=True)
    ]
    return torch.cat(products, dim=-1)
