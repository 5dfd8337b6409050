"""A linear layer's product in training, which keeps less for the backward pass than torch's.

Autocast keeps a copy of each weight in half precision, and both what goes into GELU and what comes
out. Here they are made anew when they are needed, in a thirtieth of the time that the products
take: a step of 124M under autocast peaks at 3.0 GB where `GPT2LMHeadModel` peaks at 4.9, and a CPU
without half precision takes seconds for it, where torch takes an hour.
"""

# C length of an input vector, D of an output vector, N vectors

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .half import HAS_MATRIX_UNIT, is_onednn_ahead, is_ordinary, is_slow, multiplied_as, multiply
from .private_ops import as_new_tensor, gelu_backward

_ROWS = 2**11 if HAS_MATRIX_UNIT else 2**9  # vectors that GELU is applied to at a time


def has_own_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, after_gelu: bool = False
) -> bool:
    """Whether `own_product` is better than torch's for these, and nothing is in the way.

    It is for training under autocast, where the CPU has no instructions for the half precision to
    be multiplied, and in float32 after GELU or where oneDNN is ahead.
    """
    if not is_ordinary(x, weight, bias):
        return False
    is_autocast, is_training = torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()
    dtype = torch.get_autocast_dtype("cpu") if is_autocast else weight.dtype
    if is_autocast:
        is_better = weight.dtype == torch.float32 and is_training
    else:
        keeps_less = after_gelu and weight.requires_grad and x.dtype == torch.float32
        is_better = is_training and (keeps_less or is_onednn_ahead(x))
    return (is_better or is_slow(dtype)) and x.dtype in (weight.dtype, dtype)


def cast(x: torch.Tensor) -> torch.Tensor:
    """`x` as the products of autocast on a CPU take it."""
    if x.is_cpu and x.dtype == torch.float32 and torch.is_autocast_enabled("cpu"):
        return x.to(torch.get_autocast_dtype("cpu"))
    return x


def own_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: str | None = None
) -> torch.Tensor:
    """The product of `x` (..., C) and `weight` (D, C), (..., D), plus `bias`.

    Under autocast `x` and `weight` are rounded first, as torch does. Where the CPU has no
    instructions for half precision, float32 is multiplied, and the result rounded.

    `gelu` is a form of GELU, "tanh" or "none", to apply to `x` first.
    """
    x = cast(x) if gelu is None else cast(x).contiguous()
    result: torch.Tensor = _OwnProduct.apply(x, weight, bias, gelu)
    return result


class _OwnProduct(torch.autograd.Function):
    """Keeps `x`, before GELU, and the weight itself. It can be differentiated once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        gelu: str | None,
    ) -> torch.Tensor:
        """The product (..., D); shapes and `gelu` as `own_product` takes them."""
        # A frozen weight needs no `x` for its gradient.
        ctx.save_for_backward(x if gelu or ctx.needs_input_grad[1] else None, weight)
        ctx.x_shape = x.shape
        ctx.gelu, ctx.bias_dtype = gelu, None if bias is None else bias.dtype
        dtype = multiplied_as(x.dtype)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast("cpu", enabled=False):
            if gelu is None and dtype == x.dtype:
                result = multiply(x, weight, bias)
            else:
                rows = x.reshape(-1, x.shape[-1]).split(_ROWS)
                products = [
                    multiply(_activated(some, gelu).to(dtype), weight, bias).to(x.dtype)
                    for some in rows
                ]
                result = products[0] if len(products) == 1 else torch.cat(products)
        return as_new_tensor(result, (*x.shape[:-1], len(weight)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the arguments of `forward`, made of the product's, `grad` (..., D)."""
        x, weight = ctx.saved_tensors
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        wants, grad = ctx.needs_input_grad, grad.reshape(-1, len(weight))
        with torch.autocast("cpu", enabled=False):
            grad_x, grad_weight, grad_bias = _gradients(rows, weight, grad, ctx.gelu, wants)
        return (
            None if grad_x is None else grad_x.view(ctx.x_shape),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(ctx.bias_dtype),
            None,
        )


def _activated(x: torch.Tensor, gelu: str | None) -> torch.Tensor:
    return x if gelu is None else F.gelu(x, approximate=gelu)


def _gradients(
    x: torch.Tensor | None,
    weight: torch.Tensor,
    grad: torch.Tensor,
    gelu: str | None,
    wants: list[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of `x` (N, C), `weight` (D, C) and the bias (D,), made of `grad` (N, D).

    Slow half precision goes by way of float32, a few rows at a time.
    """
    wants_x, wants_weight, wants_bias, _ = wants
    dtype, size = multiplied_as(grad.dtype), _ROWS if is_slow(grad.dtype) else max(1, len(grad))
    factor = weight.to(dtype)
    grad_x = grad.new_empty(len(grad), weight.shape[1]) if wants_x else None
    grad_weight = torch.zeros_like(factor) if wants_weight else None
    grad_bias = factor.new_zeros(len(factor)) if wants_bias else None
    for start in range(0, len(grad), size):
        rows = slice(start, start + size)
        of_rows = grad[rows].to(dtype)
        into: Any = None if x is None else x[rows].to(dtype)
        if grad_weight is not None:
            grad_weight.addmm_(of_rows.T, _activated(into, gelu))
        if grad_bias is not None:
            grad_bias += of_rows.sum(0)
        if grad_x is not None:
            product = torch.mm(of_rows, factor)
            grad_x[rows] = product if gelu is None else gelu_backward(product, into, gelu)
    return grad_x, grad_weight, grad_bias
