"""A linear layer's product in training, which keeps less for the backward pass than torch's."""

# C length of an input vector, D of an output vector, N vectors

from typing import Any

import torch
from torch.nn import functional as F

from .half import HAS_MATRIX_UNIT, is_slow, multiplied_as
from .onednn import adds_bias_apart, apply_gelu, by_onednn, is_onednn_ahead
from .plain import is_plain, is_transformed

_ROWS = 2**11 if HAS_MATRIX_UNIT else 2**9  # rows that GELU is applied to at a time


def has_own_product(x: torch.Tensor, weight: torch.Tensor, after_gelu: bool = False) -> bool:
    """Whether `own_product` is better than torch's, and nothing is in the way.

    It is for training on a CPU: under autocast, where the CPU has no instructions for the half
    precision that would be multiplied, and in float32 after GELU or where oneDNN is ahead.
    """
    is_autocast, is_training = torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()
    dtype = torch.get_autocast_dtype("cpu") if is_autocast else weight.dtype
    if is_autocast:
        is_better = weight.dtype == torch.float32 and (is_training or is_slow(dtype))
    else:
        keeps_less = after_gelu and weight.requires_grad and x.dtype == torch.float32
        is_better = is_training and (keeps_less or is_slow(dtype) or is_onednn_ahead(x))
    return (
        x.is_cpu
        and is_better
        and x.dtype in (weight.dtype, dtype)
        and not torch.compiler.is_compiling()
        and is_plain(weight)
    )


def cast(x: torch.Tensor) -> torch.Tensor:
    """`x` as autocast's products take it: once for all that read it, not for each by itself."""
    device = x.device.type
    # Not all devices have autocast, "meta" has none, and asking whether it is on is an error then.
    has_autocast = x.dtype == torch.float32 and torch.amp.is_autocast_available(device)
    if has_autocast and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def own_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: str | None = None
) -> torch.Tensor:
    """The product of `x` (..., C) and `weight` (D, C), (..., D), plus `bias`.

    Under autocast `x` and `weight` are rounded first, as torch does.

    `gelu` is a form of GELU, "tanh" or "none", to be applied to `x` first.

    torch keeps, until the backward pass, a copy of each weight in half precision, and both what
    goes into GELU and what comes out. Here the copy is made anew, and GELU computed anew, when they
    are needed, in a thirtieth of the time that the products take. Where the CPU has no instructions
    for half precision, float32 is multiplied, and what comes of it is rounded.
    """
    x = cast(x) if gelu is None else cast(x).contiguous()
    result: torch.Tensor = _OwnProduct.apply(x, weight, bias, gelu)
    return result


class _OwnProduct(torch.autograd.Function):
    """Keeps `x`, before GELU, and the weight itself; makes of them anew what backward needs."""

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
                return _multiply(x, weight, bias)
            products = []
            for rows in x.reshape(-1, x.shape[-1]).split(_ROWS):
                activated = rows if gelu is None else apply_gelu(rows, gelu)
                products.append(_multiply(activated.to(dtype), weight, bias).to(x.dtype))
        result = products[0] if len(products) == 1 else torch.cat(products)
        return _not_a_view(result, (*x.shape[:-1], len(weight)))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the arguments of `forward`, made of the product's, `grad` (..., D)."""
        x, weight = ctx.saved_tensors
        # Gradients of gradients, and of several losses at once, take operators that torch knows.
        is_batched = torch._C._functorch.is_legacy_batchedtensor(grad) or is_transformed()
        in_place = not (torch.is_grad_enabled() or is_batched)
        gradients = _wide_gradients if in_place and is_slow(grad.dtype) else _gradients
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        with torch.autocast("cpu", enabled=False):
            grad_rows, grad_weight, grad_bias = gradients(
                rows,
                weight,
                grad.reshape(-1, len(weight)),
                ctx.gelu,
                ctx.needs_input_grad,
                in_place,
            )
        grad_x = None if grad_rows is None else grad_rows.view(ctx.x_shape)
        if grad_bias is not None:
            grad_bias = grad_bias.to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product of `x` (..., C) and `weight` (D, C), plus `bias`, without a gradient."""
    is_better = is_onednn_ahead(x) or (bias is not None and adds_bias_apart(x))
    product = (by_onednn if is_better else F.linear)(x, weight, bias)
    return _not_a_view(product, product.shape)


def _not_a_view(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """`x`, new memory, in another shape, as a tensor by itself.

    A view that such a function returns cannot be changed in place, and FSDP warns of it.
    """
    result: torch.Tensor = torch.ops.aten._unsafe_view(x, shape)
    return result


_Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _gradients(
    x: torch.Tensor | None,
    weight: torch.Tensor,
    grad: torch.Tensor,
    gelu: str | None,
    wants: list[bool],
    in_place: bool,
) -> _Gradients:
    """Gradients of `x` (N, C), `weight` (D, C) and the bias (D,), made of `grad` (N, D)."""
    wants_x, wants_weight, wants_bias, _ = wants
    grad_x = grad_weight = into = None
    if x is not None:
        into = x if gelu is None else apply_gelu(x, gelu)
    if wants_weight:
        assert into is not None, "kept for this"
        grad_weight = (grad.T @ into).to(weight.dtype)
    if wants_x:
        narrow = weight.to(grad.dtype)
        if gelu is None:
            grad_x = grad @ narrow
        elif not in_place:
            grad_x = torch.ops.aten.gelu_backward(grad @ narrow, x, approximate=gelu)
        else:  # in the memory of what is not needed any more
            product = torch.mm(grad, narrow, out=into)
            grad_x = torch.ops.aten.gelu_backward.grad_input(
                product, x, approximate=gelu, grad_input=product
            )
    return grad_x, grad_weight, grad.sum(0) if wants_bias else None


def _wide_gradients(
    x: torch.Tensor | None,
    weight: torch.Tensor,
    grad: torch.Tensor,
    gelu: str | None,
    wants: list[bool],
    in_place: bool = True,
) -> _Gradients:
    """The same by way of float32, a few rows at a time."""
    wants_x, wants_weight, wants_bias, _ = wants
    factor = weight.float()
    grad_x = grad.new_empty(len(grad), weight.shape[1]) if wants_x else None
    grad_weight = torch.zeros_like(factor) if wants_weight else None
    grad_bias = factor.new_zeros(len(factor)) if wants_bias else None
    for start in range(0, len(grad), _ROWS):
        rows = slice(start, start + _ROWS)
        of_rows = grad[rows].float()
        into: Any = None if x is None else x[rows].float()
        activated = into if gelu is None else apply_gelu(into, gelu)
        if grad_weight is not None:
            grad_weight.addmm_(of_rows.T, activated)
        if grad_bias is not None:
            grad_bias += of_rows.sum(0)
        if grad_x is not None:
            product = torch.mm(of_rows, factor)
            if gelu is not None:
                product = torch.ops.aten.gelu_backward(product, into, approximate=gelu)
            grad_x[rows] = product
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype)
    return grad_x, grad_weight, grad_bias
