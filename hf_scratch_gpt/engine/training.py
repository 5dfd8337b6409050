"""Parts of a model that learns on a CPU; see `own_product.py` and `loss.py` for what they earn."""

# B batch, T tokens, H heads, D head size, C hidden

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..model.blocks_scratch_gpt import masked_attention
from .half import is_ordinary, is_slow
from .loss import causal_loss, product_dtype
from .own_product import cast, has_own_product, own_product
from .packed import fused_gelu
from .private_ops import is_watched

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
