"""The linear layer, with ways of its own where a CPU answers slower than it could."""

# C length of an input vector, D of an output vector, N vectors

import torch
from torch import nn
from torch.nn import functional as F

from .half import HAS_MATRIX_UNIT, is_slow
from .onednn import adds_bias_apart, by_onednn, is_onednn_ahead, without_onednn
from .own_product import has_own_product, own_product
from .plain import fit, is_plain_inference

_PIECE = 2**20  # numbers of a matrix that are turned into float32 at a time; a cache holds them
_FEW = 3  # vectors that half precision multiplies as fast as float32, which is more to write


class Linear(nn.Linear):
    """y = x W^T + b: torch's own layer, faster on CPUs.

    To write one token a model reads all its weights, so the speed of memory is the limit. Three of
    torch's ways stay far below it (figures in `benchmarks/NOTES.md`): in float32, if not on Intel's
    processors, the product of a matrix and one vector runs on one thread, where oneDNN, which torch
    has as well, takes them all; in bfloat16 it is oneDNN's, which rearranges the matrix each time,
    where others read it as it lies, up to twice as fast; and compiled code calls the same slow
    products, where the sum written out becomes a loop that reads as fast as memory gives.

    Half precision that the CPU has no instructions for is multiplied in float32. Training under
    autocast keeps less for the backward pass, and in float32 is multiplied by oneDNN where that is
    ahead: see `own_product`.
    """

    def reset_parameters(self) -> None:
        """Draw the weight and the bias, if they have numbers: not while a model is being loaded."""
        # torch takes a tenth of the time that loading GPT-2 takes to draw none.
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map `input` (..., C) to (..., D)."""
        return linear(input, self.weight, self.bias)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product of `x` (..., C) and `weight` (D, C), (..., D), plus `bias`."""
    if _is_torch_ahead(x) or not fit(x, weight, bias):
        return F.linear(x, weight, bias)
    if is_plain_inference(x, weight):
        if torch.compiler.is_compiling():
            if is_one_token(x):
                return written_out(x, weight, bias)
        elif is_onednn_ahead(x):
            return by_onednn(x, weight, bias)
        elif is_slow(x.dtype) and x.numel() > _FEW * x.shape[-1]:
            return by_float32(x, weight, bias)
        elif x.dtype == torch.bfloat16 and is_one_token(x) and weight.is_contiguous():
            return by_vector(x, weight, bias)
        elif bias is not None and adds_bias_apart(x):
            return by_onednn(x, weight, bias)
    if has_own_product(x, weight):
        return own_product(x, weight, bias)
    return F.linear(x, weight, bias)


def _is_torch_ahead(x: torch.Tensor) -> bool:
    """Whether nothing here is ahead of torch: asked first, as it may be asked 73 times a token."""
    return x.dtype == torch.float32 and not (
        is_onednn_ahead(x)
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    )


def is_one_token(x: torch.Tensor) -> bool:
    """Whether `x` (..., C) is one vector."""
    return x.numel() == x.shape[-1]


def written_out(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product of one vector `x` (..., C) and `weight` (D, C), (..., D), to be compiled.

    It is summed in float32, as half precision has too few digits for a thousand terms.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    # Inductor would compute what makes `x`, a LayerNorm say, anew for every row of the weight; it
    # keeps what is viewed by strides.
    x_once = x.contiguous().as_strided((1, x.numel()), (x.numel(), 1))
    product = (x_once.to(wide) * weight.to(wide)).sum(-1)
    if bias is not None:
        product = product + bias.to(wide)
    return product.to(x.dtype).view(*x.shape[:-1], -1)


def by_vector(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product of one vector `x` (..., C) and `weight` (D, C), (..., D), in bfloat16."""
    if not HAS_MATRIX_UNIT:
        return without_onednn(x, weight, bias)
    # The matrix first: oneDNN then reads it as it lies, and does not rearrange it for the unit.
    vector = x.reshape(-1)
    product = torch.mv(weight, vector) if bias is None else torch.addmv(bias, weight, vector)
    return product.view(*x.shape[:-1], -1)


def by_float32(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product of `x` (..., C) and `weight` (D, C), in half precision, by way of float32."""
    wide, rows = x.float(), max(1, _PIECE // weight.shape[1])
    pieces = weight.split(rows)
    biases = [None] * len(pieces) if bias is None else bias.float().split(rows)
    products = [
        linear(wide, piece.float(), of_piece).to(x.dtype)
        for piece, of_piece in zip(pieces, biases, strict=True)
    ]
    return torch.cat(products, dim=-1)
