"""The linear layer, with ways of its own where a CPU answers slower than it could."""

import platform
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.backends import mkldnn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_ROWS = 2**9  # rows that GELU is applied to at a time
_PIECE = 2**20  # numbers of a matrix that are turned into float32 at a time; a cache holds them
_FEW = 3  # vectors that half precision multiplies as fast as float32, which is more to write
_HAS_ONEDNN = mkldnn.is_available()


def _slow_dtypes() -> frozenset[torch.dtype]:
    """Types of half precision that this processor, an x86, has no instructions for.

    torch then multiplies at a tenth of float32's speed, and some products at a hundredth.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    has_instructions = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return frozenset(
        dtype for dtype, has in has_instructions.items() if not (_HAS_ONEDNN and has())
    )


SLOW_DTYPES = _slow_dtypes()


class Linear(nn.Linear):
    """y = x W^T + b: torch's own layer, faster on CPUs where no gradient is asked for.

    To write one token a model reads all its weights, so the speed of memory is the limit. Three of
    torch's ways stay far below it (figures in `benchmarks/NOTES.md`): in float32 the product of a
    matrix and one vector runs on one thread, where oneDNN, which torch has as well, takes them all;
    in bfloat16 it is oneDNN's, which rearranges the matrix each time, where torch's own reads it as
    it lies, twice as fast; and compiled code calls the same slow products, where the sum written
    out becomes a loop that reads as fast as memory gives.

    Half precision that the CPU has no instructions for is multiplied in float32.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map `input` (..., C) to (..., D)."""
        return linear(input, self.weight, self.bias)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product of `x` (..., C) and `weight` (D, C), (..., D), plus `bias`."""
    is_right = x.shape[-1:] == weight.shape[-1:]  # torch has the better error
    if x.is_cpu and is_right and is_plain_inference(x, weight):
        if torch.compiler.is_compiling():
            if is_one_token(x):
                return written_out(x, weight, bias)
        elif _HAS_ONEDNN and x.dtype == torch.float32:
            return by_onednn(x, weight, bias)
        elif x.dtype in SLOW_DTYPES and x.numel() > _FEW * x.shape[-1]:
            return by_float32(x, weight, bias)
        elif x.dtype == torch.bfloat16 and is_one_token(x) and weight.is_contiguous():
            return without_onednn(x, weight, bias)
    if is_right and has_own_product(x, weight):
        return own_product(x, weight, bias)
    return F.linear(x, weight, bias)


def is_plain_inference(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether no gradient, no tracing, no other type of tensor and no cast is in the way."""
    return (
        not torch.is_grad_enabled()
        and x.dtype == weight.dtype
        and not torch.is_autocast_enabled("cpu")
        and _is_plain(weight)
    )


def has_own_product(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `own_product` is better than torch's, and nothing is in the way.

    It is for training under autocast on a CPU, and where the CPU has no instructions for the half
    precision that would be multiplied.
    """
    is_autocast, is_training = torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()
    dtype = torch.get_autocast_dtype("cpu") if is_autocast else weight.dtype
    is_slow = dtype in SLOW_DTYPES
    if is_autocast:
        is_better = weight.dtype == torch.float32 and (is_training or is_slow)
    else:
        is_better = is_training and is_slow
    return (
        x.is_cpu
        and is_better
        and x.dtype in (weight.dtype, dtype)
        and not torch.compiler.is_compiling()
        and _is_plain(weight)
    )


def _is_plain(weight: torch.Tensor) -> bool:
    """Whether no tracing and no other type of tensor is in the way."""
    return (
        type(weight) in (nn.Parameter, torch.Tensor)
        and not torch.compiler.is_exporting()
        and not torch.jit.is_tracing()
        # Code that watches operators knows torch's; oneDNN's would go uncounted.
        and not is_in_torch_dispatch_mode()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def is_one_token(x: torch.Tensor) -> bool:
    """Whether `x` (..., C) is one vector."""
    return x.numel() == x.shape[-1]


def is_changed(part: nn.Module) -> bool:
    """Whether hooks or a `forward` of its own change what `part` gives, or look at it."""
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
    return "forward" in vars(part) or any(hook.__module__ != watchers for hook in hooks)


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


def without_onednn(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The product of `x` (..., C) and `weight` (D, C) by torch's own code.

    torch asks one switch of the process whether to call oneDNN, and it is off meanwhile: a thread
    that computes beside this one may miss it for that moment, which costs time and no more.
    """
    if not mkldnn.enabled:
        return F.linear(x, weight, bias)
    mkldnn.set_flags(_enabled=False)
    try:
        return F.linear(x, weight, bias)
    finally:
        mkldnn.set_flags(_enabled=True)


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
    """The product of `x` (..., C) and `weight` (D, C), (..., D), plus `bias`, as under autocast.

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
        ctx.save_for_backward(x, weight)
        ctx.gelu, ctx.bias_dtype = gelu, None if bias is None else bias.dtype
        dtype = _multiplied_as(x.dtype)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast("cpu", enabled=False):
            if gelu is None:
                return F.linear(x.to(dtype), weight, bias).to(x.dtype)
            # A few rows at a time, as memory of that size is at hand: fresh memory is slow.
            made = []
            for rows in x.view(-1, x.shape[-1]).split(_ROWS):
                activated = F.gelu(rows, approximate=gelu).to(dtype)
                made.append(F.linear(activated, weight, bias).to(x.dtype))
        return torch.cat(made).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.autocast("cpu", enabled=False):
            return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """What `_OwnProduct.backward` gives: the gradients of its inputs."""
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
    grad_x = grad_weight = grad_bias = None
    dtype = _multiplied_as(grad.dtype)
    rows = grad.reshape(-1, grad.shape[-1]).to(dtype)  # (N, D)
    into = x if ctx.gelu is None else F.gelu(x, approximate=ctx.gelu)
    if wants_weight:
        grad_weight = (rows.T @ into.reshape(-1, into.shape[-1]).to(dtype)).to(weight.dtype)
    if wants_bias:
        grad_bias = rows.sum(0).to(ctx.bias_dtype)
    if wants_x:
        weight = weight.to(dtype)
        if ctx.gelu is not None and dtype == into.dtype and not torch.is_grad_enabled():
            grad_x = torch.mm(rows, weight, out=into.view(-1, into.shape[-1]))
        else:
            grad_x = (rows @ weight).to(x.dtype)
        grad_x = grad_x.view(x.shape)
        if ctx.gelu is not None and torch.is_grad_enabled():  # it will be differentiated
            grad_x = torch.ops.aten.gelu_backward(grad_x, x, approximate=ctx.gelu)
        elif ctx.gelu is not None:
            grad_x = torch.ops.aten.gelu_backward.grad_input(
                grad_x, x, approximate=ctx.gelu, grad_input=grad_x
            )
    return grad_x, grad_weight, grad_bias, None


def _multiplied_as(dtype: torch.dtype) -> torch.dtype:
    """The type in which the CPU multiplies numbers of `dtype`."""
    return torch.float32 if dtype in SLOW_DTYPES else dtype
