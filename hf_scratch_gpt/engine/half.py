"""What a CPU does with half precision: where it has no instructions for it, float32 is used."""

# B batch, T tokens, H heads, D head size

import platform
from collections.abc import Callable
from typing import Any

import torch
from torch.backends import mkldnn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .plain import is_plain


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
    is_there = mkldnn.is_available()
    return frozenset(dtype for dtype, has in has_instructions.items() if not (is_there and has()))


# What of transformers' attention functions sdpa's alone can do.
OF_SDPA = ("is_causal", "position_bias", "cache", "softcap")
_SLOW_DTYPES = _slow_dtypes()
# Multiplies tiles of bfloat16 by one another: Intel's AMX.
HAS_MATRIX_UNIT: bool = torch.cpu.get_capabilities().get("amx_bf16", False)


def is_slow(dtype: torch.dtype) -> bool:
    """Whether the CPU has no instructions for `dtype`."""
    return dtype in _SLOW_DTYPES


def multiplied_as(dtype: torch.dtype) -> torch.dtype:
    """The type in which the CPU multiplies numbers of `dtype`."""
    return torch.float32 if is_slow(dtype) else dtype


def is_slow_attention(query: torch.Tensor, is_fused: bool) -> bool:
    """Whether attention of `query` is better computed in float32.

    torch's fused kernel is slow in the backward pass alone; products written out always are.
    """
    return (
        query.is_cpu
        and is_slow(query.dtype)
        and (torch.is_grad_enabled() or not is_fused)
        and not torch.compiler.is_compiling()
    )


def attend_in_float32(
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attend`, an attention function of transformers', on inputs in float32, its results rounded.

    Shapes are those of `masked_attention`.
    """
    is_fused = attend is sdpa_attention_forward and attention_mask is None
    if is_fused and _is_plainly_causal(module, query, key, value, **kwargs):
        gathered: torch.Tensor = _CausalAttention.apply(query, key, value, kwargs["scaling"])
        return gathered.transpose(1, 2).contiguous(), None
    if isinstance(attention_mask, torch.Tensor) and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast("cpu", enabled=False):
        gathered, weights = attend(
            module, query.float(), key.float(), value.float(), attention_mask, **kwargs
        )
    return gathered.to(query.dtype), None if weights is None else weights.to(query.dtype)


def _is_plainly_causal(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float = 0.0,
    **kwargs: Any,
) -> bool:
    """Whether each token looks at itself and all before it, and nothing else is asked for."""
    return (
        query.shape == key.shape == value.shape
        and query.shape[2] > 1
        and bool(module.is_causal)
        and not dropout
        and all(kwargs.get(name) is None for name in OF_SDPA)
        and torch.is_grad_enabled()
        and torch.backends.cuda.flash_sdp_enabled()  # this CPU's as well
        and is_plain(query)
    )


class _CausalAttention(torch.autograd.Function):
    """torch's fused kernel in float32; for the backward pass, half precision is kept."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """What each token gathers; all are (B, H, T, D)."""
        wide, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query.float(), key.float(), value.float(), 0.0, True, scale=scaling
        )
        gathered: torch.Tensor = wide.to(query.dtype)
        ctx.save_for_backward(query, key, value, gathered, sums)
        ctx.scaling = scaling
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key and value, made of that of what was gathered."""
        *inputs, sums = ctx.saved_tensors
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad.float(), *(x.float() for x in inputs), sums, 0.0, True, scale=ctx.scaling
        )
        return (*(gradient.to(grad.dtype) for gradient in gradients), None)
