"""Parts of a model that learns on a CPU, and keeps less for the backward pass than torch's.

Autocast keeps a copy of each weight in half precision, and both what goes into GELU and what comes
out. Here they are made anew when they are needed, in a thirtieth of the time that the products
take: a step of 124M under autocast peaks at 3.0 GB where `GPT2LMHeadModel` peaks at 4.9, and a CPU
without half precision takes seconds for it, where torch takes an hour.
"""

# B batch, T tokens, C length of an input vector, D of an output vector, N vectors

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..model.blocks_scratch_gpt import masked_attention
from .half import HAS_MATRIX_UNIT, is_onednn_ahead, is_ordinary, is_slow, multiplied_as, multiply
from .loss import causal_loss, product_dtype
from .packed import fused_gelu
from .private_ops import as_new_tensor, is_watched

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
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: str | None
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
        with torch.enable_grad():
            given: Any = None if x is None else x[rows].to(dtype).detach().requires_grad_()
            activated: Any = None if x is None else _activated(given, gelu)
        if grad_weight is not None:
            grad_weight.addmm_(of_rows.T, activated.detach())
        if grad_bias is not None:
            grad_bias += of_rows.sum(0)
        if grad_x is not None:
            product = torch.mm(of_rows, factor)
            if gelu is not None:
                (product,) = torch.autograd.grad(activated, given, product)
            grad_x[rows] = product
    return grad_x, grad_weight, grad_bias


# Names of attention functions of transformers', and of those here that replace them in training.
IN_FLOAT32 = {"sdpa": "sdpa_in_float32", "eager": "eager_in_float32"}


class LeanLinear(nn.Linear):
    """Keeps less for the backward pass, and multiplies slow half precision in float32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map `input` (..., C) to (..., D)."""
        if has_own_product(input, self.weight, self.bias):
            return own_product(input, self.weight, self.bias)
        return super().forward(input)


class LeanFeedForward(nn.Module):
    """Makes GELU and the second layer one product, which keeps the input of GELU alone."""

    up_proj: Any
    activation: Any
    down_proj: Any
    dropout: Any

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `hidden_states` (B, T, C) to (B, T, C)."""
        inner = self.up_proj(hidden_states)
        down, form = self.down_proj, fused_gelu(self.activation)
        can_fuse = form is not None and isinstance(down, LeanLinear) and not is_watched(down)
        if can_fuse and has_own_product(inner, down.weight, down.bias, after_gelu=True):
            return self.dropout(own_product(inner, down.weight, down.bias, gelu=form))
        return self.dropout(self.down_proj(self.activation(inner)))


class LeanAttention(nn.Module):
    """Rounds what it reads once for query, key and value, so that one copy of it is kept."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Attend, as the class that this one replaces."""
        return super().forward(cast(hidden_states), *args, **kwargs)


class LossInPieces(nn.Module):
    """Computes the loss by `causal_loss` where the configuration asks for a loss in pieces."""

    lm_head: Any

    def loss_in_pieces(
        self, hidden_states: torch.Tensor, labels: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """The loss of `hidden_states` (B, T, C) and `labels` (B, T), as the model's own."""
        head = self.lm_head
        is_known = head.bias is None and is_ordinary(hidden_states, head.weight)
        if is_known and product_dtype(head.weight) != torch.float16:
            return causal_loss(hidden_states, head.weight, labels, **kwargs)
        return super().loss_in_pieces(hidden_states, labels, **kwargs)  # type: ignore[misc]


Attend = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def _in_float32(attend: Attend) -> Attend:
    """`attend`, which takes half precision without instructions for it as float32, in training.

    The gradient of torch's kernel, in bfloat16 on an AVX2 machine, took 8 s of a step of 16; in
    float32 0.7. Products written out are slow in inference as well.
    """
    is_fused = attend is sdpa_attention_forward

    @functools.wraps(attend)
    def in_float32(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        is_slower = is_slow(query.dtype) and (torch.is_grad_enabled() or not is_fused)
        if not (is_slower and query.is_cpu) or torch.compiler.is_compiling():
            return attend(module, query, key, value, attention_mask, **kwargs)
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        with torch.autocast("cpu", enabled=False):
            gathered, weights = attend(
                module, query.float(), key.float(), value.float(), attention_mask, **kwargs
            )
        return gathered.to(query.dtype), None if weights is None else weights.to(query.dtype)

    return in_float32


ALL_ATTENTION_FUNCTIONS.register(IN_FLOAT32["sdpa"], _in_float32(sdpa_attention_forward))
ALL_ATTENTION_FUNCTIONS.register(IN_FLOAT32["eager"], _in_float32(masked_attention))
ALL_MASK_ATTENTION_FUNCTIONS.register(IN_FLOAT32["sdpa"], sdpa_mask)
ALL_MASK_ATTENTION_FUNCTIONS.register(IN_FLOAT32["eager"], eager_mask)
