"""The linear layer, with ways of its own where a CPU answers slower than it could."""

# C length of an input vector, D of an output vector, N vectors

from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.backends import mkldnn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .half_scratch_gpt import HAS_MATRIX_UNIT, is_slow, multiplied_as

_ROWS = 2**11 if HAS_MATRIX_UNIT else 2**9  # rows that GELU is applied to at a time
_PIECE = 2**20  # numbers of a matrix that are turned into float32 at a time; a cache holds them
_FEW = 3  # vectors that half precision multiplies as fast as float32, which is more to write
_CPU = torch.cpu.get_capabilities().get("cpu_name", "")
# torch multiplies float32 by MKL, which is at its best on processors of its maker's.
_IS_ONEDNN_AHEAD = mkldnn.is_available() and not _CPU.startswith("Intel")


class Linear(nn.Linear):
    """y = x W^T + b: torch's own layer, faster on CPUs.

    To write one token a model reads all its weights, so the speed of memory is the limit. Three of
    torch's ways stay far below it (figures in `benchmarks/NOTES.md`): in float32, if not on Intel's
    processors, the product of a matrix and one vector runs on one thread, where oneDNN, which torch
    has as well, takes them all; in bfloat16 it is oneDNN's, which rearranges the matrix each time,
    where others read it as it lies, up to twice as fast; and compiled code calls the same slow
    products, where the sum written out becomes a loop that reads as fast as memory gives.

    Half precision that the CPU has no instructions for is multiplied in float32, and training under
    autocast keeps less for the backward pass: see `own_product`.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map `input` (..., C) to (..., D)."""
        return linear(input, self.weight, self.bias)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product of `x` (..., C) and `weight` (D, C), (..., D), plus `bias`."""
    if _is_torch_ahead(x) or not _fit(x, weight, bias):
        return F.linear(x, weight, bias)
    if is_plain_inference(x, weight):
        if torch.compiler.is_compiling():
            if is_one_token(x):
                return written_out(x, weight, bias)
        elif _IS_ONEDNN_AHEAD and x.dtype == torch.float32 and mkldnn.enabled:
            return by_onednn(x, weight, bias)
        elif is_slow(x.dtype) and x.numel() > _FEW * x.shape[-1]:
            return by_float32(x, weight, bias)
        elif x.dtype == torch.bfloat16 and is_one_token(x) and weight.is_contiguous():
            return by_vector(x, weight, bias)
    if has_own_product(x, weight):
        return own_product(x, weight, bias)
    return F.linear(x, weight, bias)


def _is_torch_ahead(x: torch.Tensor) -> bool:
    """Whether nothing here is ahead of torch: asked first, as it may be asked 73 times a token."""
    return x.dtype == torch.float32 and not (
        _IS_ONEDNN_AHEAD
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    )


def _fit(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether these are a CPU's and go together; with others torch knows better what to do."""
    return (
        x.is_cpu
        and weight.is_cpu
        and weight.layout == torch.strided
        and weight.ndim == 2
        and not x.is_nested
        and x.shape[-1:] == weight.shape[-1:]
        and (
            bias is None
            or (bias.is_cpu and bias.dtype == weight.dtype and bias.shape == weight.shape[:1])
        )
    )


def is_plain_inference(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether no gradient, no tracing, no other type of tensor and no cast is in the way."""
    return (
        not torch.is_grad_enabled()
        and x.dtype == weight.dtype
        and not torch.is_autocast_enabled("cpu")
        and is_plain(weight)
    )


def has_own_product(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `own_product` is better than torch's, and nothing is in the way.

    It is for training under autocast on a CPU, and where the CPU has no instructions for the half
    precision that would be multiplied.
    """
    is_autocast, is_training = torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()
    dtype = torch.get_autocast_dtype("cpu") if is_autocast else weight.dtype
    if is_autocast:
        is_better = weight.dtype == torch.float32 and (is_training or is_slow(dtype))
    else:
        is_better = is_training and is_slow(dtype)
    return (
        x.is_cpu
        and is_better
        and x.dtype in (weight.dtype, dtype)
        and not torch.compiler.is_compiling()
        and is_plain(weight)
    )


def is_plain(weight: torch.Tensor) -> bool:
    """Whether `weight` is an ordinary tensor, and nothing traces, maps or watches operators."""
    return (
        type(weight) in (nn.Parameter, torch.Tensor)
        and not torch.compiler.is_exporting()
        and not torch.jit.is_tracing()
        # Code that watches operators knows torch's; oneDNN's would go uncounted.
        and not is_in_torch_dispatch_mode()
        and not is_transformed()
    )


def is_transformed() -> bool:
    """Whether `torch.func` or `vmap` is at work, or derivatives are computed forwards."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_one_token(x: torch.Tensor) -> bool:
    """Whether `x` (..., C) is one vector."""
    return x.numel() == x.shape[-1]


def is_changed(part: nn.Module) -> bool:
    """Whether hooks or a `forward` of its own change what `part` gives, or look at it.

    Hooks on all modules count as well.
    """
    hooks = [
        hook
        for of_a_kind in (
            part._forward_pre_hooks,
            part._forward_hooks,
            part._backward_pre_hooks,
            part._backward_hooks,
        )
        for hook in of_a_kind.values()
    ]
    # transformers leaves hooks behind that look for hidden states, if they were ever asked for.
    watchers = "transformers.utils.output_capturing"
    return (
        "forward" in vars(part)
        or nn.modules.module._has_any_global_hook()
        or any(hook.__module__ != watchers for hook in hooks)
    )


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


def by_vector(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product of one vector `x` (..., C) and `weight` (D, C), (..., D), in bfloat16."""
    if not HAS_MATRIX_UNIT:
        return without_onednn(x, weight, bias)
    # The matrix first: oneDNN then reads it as it lies, and does not rearrange it for the unit.
    vector = x.reshape(-1)
    product = torch.mv(weight, vector) if bias is None else torch.addmv(bias, weight, vector)
    return product.view(*x.shape[:-1], -1)


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


def cast(x: torch.Tensor) -> torch.Tensor:
    """`x` as autocast's products take it: once for all that read it, not for each by itself."""
    device = x.device.type
    # Not all devices have autocast, "meta" has none, and asking whether it is on is an error then.
    has_autocast = x.dtype == torch.float32 and torch.amp.is_autocast_available(device)
    if has_autocast and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


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
                activated = rows if gelu is None else F.gelu(rows, approximate=gelu)
                products.append(_multiply(activated.to(dtype), weight, bias).to(x.dtype))
        result = products[0] if len(products) == 1 else torch.cat(products)
        return result.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the arguments of `forward`, made of the product's, `grad` (..., D)."""
        x, weight = ctx.saved_tensors
        # Gradients of gradients, and of several losses at once, take operators that torch knows.
        is_batched = torch._C._functorch.is_legacy_batchedtensor(grad)
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
    # torch writes the bias first, and adds the product to it; oneDNN adds it on the way.
    if HAS_MATRIX_UNIT and mkldnn.enabled and x.dtype == torch.bfloat16 and bias is not None:
        return by_onednn(x, weight, bias)
    return F.linear(x, weight, bias)


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
        into = x if gelu is None else F.gelu(x, approximate=gelu)
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
        activated = into if gelu is None else F.gelu(into, approximate=gelu)
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
