"""Parts of a model that learns on a CPU, and keeps less for the backward pass than torch's.

Autocast keeps a copy of each weight in half precision, and both what goes into GELU and what comes
out. Here they are made anew when they are needed, in a thirtieth of the time that the products
take: a step of 124M under autocast peaks at 3.0 GB where `GPT2LMHeadModel` peaks at 4.9, and a CPU
without half precision takes seconds for it, where torch takes an hour.
"""

# B batch, T tokens, C length of an input vector, D of an output vector, N vectors

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .half import autocast_dtype, is_ordinary, is_slow, multiplied_as, product
from .packed import fused_gelu
from .private_ops import is_watched


def own_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: str | None = None
) -> torch.Tensor:
    """The product of `x` (..., C) and `weight` (D, C), (..., D), plus `bias`; if `is_ordinary`.

    Under autocast `x` and `weight` are rounded first, as torch does. Where the CPU has no
    instructions for half precision, float32 is multiplied, and the result rounded.

    `gelu` is a form of GELU, "tanh" or "none", to apply to `x` first.
    """
    x = x.to(autocast_dtype(x.dtype))
    # Flat, since a view that an autograd function returns could not be changed in place.
    result: torch.Tensor = _OwnProduct.apply(x.reshape(-1, x.shape[-1]), weight, bias, gelu)
    return result.view(*x.shape[:-1], len(weight))


class _OwnProduct(torch.autograd.Function):
    """Keeps `x`, before GELU, and the weight itself. It can be differentiated once."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: str | None
    ) -> torch.Tensor:
        """The product (N, D) of `x` (N, C); `weight`, `bias` and `gelu` as in `own_product`."""
        # A frozen weight needs no `x` for its gradient.
        ctx.save_for_backward(x if gelu or ctx.needs_input_grad[1] else None, weight)
        ctx.gelu = gelu
        activated = x if gelu is None else F.gelu(x, approximate=gelu)
        with torch.autocast("cpu", enabled=False):
            return product(activated, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the arguments of `forward`, made of the product's, `grad` (N, D)."""
        given, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        narrow, dtype = grad.dtype, multiplied_as(grad.dtype)
        with torch.autocast("cpu", enabled=False):
            grad = grad.to(dtype)
            x: Any = None if given is None else given.to(dtype).detach().requires_grad_()
            activated = x
            if ctx.gelu is not None:
                with torch.enable_grad():
                    activated = F.gelu(x, approximate=ctx.gelu)
            if wants_weight:
                grad_weight = (grad.T @ activated.detach()).to(weight.dtype)
            if wants_bias:
                grad_bias = grad.sum(0).to(weight.dtype)
            if wants_x:
                grad_x = grad @ weight.to(dtype)
                if ctx.gelu is not None:
                    (grad_x,) = torch.autograd.grad(activated, x, grad_x)
                grad_x = grad_x.to(narrow)
        return grad_x, grad_weight, grad_bias, None


class LeanLinear(nn.Linear):
    """Keeps less for the backward pass, and multiplies slow half precision in float32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map `input` (..., C) to (..., D)."""
        if self.is_better_for(input):
            return own_product(input, self.weight, self.bias)
        return super().forward(input)

    def is_better_for(self, input: torch.Tensor) -> bool:
        """Whether `own_product` gives what torch gives, and is ahead."""
        is_learning = torch.is_grad_enabled() or is_slow(autocast_dtype(input.dtype))
        return is_learning and is_ordinary(input, self.weight, self.bias)


class LeanFeedForward(nn.Module):
    """Makes GELU and the second layer one product, which keeps the input of GELU alone."""

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `hidden_states` (B, T, C) to (B, T, C)."""
        inner = self.up_proj(hidden_states)
        down, form = self.down_proj, fused_gelu(self.activation)
        can_fuse = form is not None and isinstance(down, LeanLinear) and not is_watched(down)
        if can_fuse and down.is_better_for(inner):
            return self.dropout(own_product(inner, down.weight, down.bias, gelu=form))
        return self.dropout(down(self.activation(inner)))


class LeanAttention(nn.Module):
    """Keeps one copy of what query, key and value read, and learns slow half precision in float32.

    The gradient of torch's kernel, in bfloat16 on an AVX2 machine, took 8 s of a step of 16; in
    float32 0.7.
    """

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Attend, as the class that this one replaces."""
        attend, narrow = super().forward, autocast_dtype(hidden_states.dtype)
        is_slower = hidden_states.is_cpu and is_slow(narrow) and torch.is_grad_enabled()
        layers: Any = (part for part in self.modules() if type(part) is nn.Linear)
        in_half = (layer.weight.dtype != torch.float32 for layer in layers)  # an adapter's base
        if not is_slower or torch.compiler.is_compiling() or any(in_half):
            return attend(hidden_states.to(narrow), attention_mask, **kwargs)
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        with torch.autocast("cpu", enabled=False):
            gathered, weights = attend(hidden_states.float(), attention_mask, **kwargs)
        return gathered.to(narrow), None if weights is None else weights.to(narrow)
