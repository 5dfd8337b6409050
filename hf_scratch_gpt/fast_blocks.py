"""Parts of a model that only generates, on a CPU.

Weights are packed or in eight bits, GELU is computed where a product leaves its numbers, and
attention in bfloat16 has a way of its own.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .blocks_scratch_gpt import FeedForward
from .linear_scratch_gpt import by_onednn, is_one_token, is_plain_inference, linear, written_out
from .one_token import is_changed

ATTENTION = "bands_or_sdpa"  # its name in transformers
_PIECE = 2**22  # numbers that are turned back from int8 at a time
_SCORES = 3 * 2**19  # scores at a time: they stay in a core's cache


class PackedLinear(nn.Linear):
    """Keeps a copy of its weight in the order in which oneDNN reads it."""

    packed: "_Packed"

    @classmethod
    def take_over(cls, layer: nn.Linear) -> None:
        """Make `layer` one of these."""
        layer.__class__ = cls
        layer.packed = _Packed(layer.weight.detach())  # type: ignore[assignment]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if is_plain_inference(input, self.weight):
            if not torch.compiler.is_compiling():
                return by_onednn(input, self.packed.weight, self.bias)
            if is_one_token(input):
                return written_out(input, self.weight, self.bias)
        return super().forward(input)


class _Packed:
    """A weight in oneDNN's order, which torch cannot copy; copies of a layer share it."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def __deepcopy__(self, memo: dict[int, object]) -> "_Packed":
        return self


class PackedFeedForward(FeedForward):
    """Lets oneDNN compute GELU while it writes the first layer's product."""

    @classmethod
    def take_over(cls, mlp: nn.Module) -> None:
        """Make `mlp`, whose layers are packed and whose activation is GELU, one of these."""
        mlp.__class__ = cls

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        up: Any = self.up_proj
        is_packed = type(up) is PackedLinear and is_plain_inference(hidden_states, up.weight)
        is_watched = is_changed(up) or is_changed(self.activation)
        if not is_packed or is_watched or torch.compiler.is_compiling():
            return super().forward(hidden_states)
        inner = by_onednn(hidden_states, up.packed.weight, up.bias, gelu=self.activation.form)
        return self.dropout(self.down_proj(inner))


class Int8Linear(nn.Linear):
    """Keeps its weight in int8, (D, C), with one scale for each row, (D,): weight * scale.

    The largest number of a row becomes 127 or -127, the rest are rounded to the nearest.
    """

    weight_scale: torch.Tensor

    @classmethod
    def take_over(cls, layer: nn.Linear) -> None:
        """Make `layer` one of these."""
        weight = layer.weight.detach()
        wide = torch.promote_types(weight.dtype, torch.float32)
        scale = weight.abs().amax(1).to(wide).clamp(min=torch.finfo(wide).tiny) / 127
        rows = max(1, _PIECE // weight.shape[1])
        pieces = zip(weight.split(rows), scale.split(rows), strict=True)
        quantized = torch.cat([(w / s[:, None]).round().to(torch.int8) for w, s in pieces])
        layer.__class__ = cls
        layer.weight = nn.Parameter(quantized, requires_grad=False)
        layer.register_buffer("weight_scale", scale)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        pieces = self.weight.split(max(1, _PIECE // self.in_features))
        products = [linear(input, piece.to(input.dtype), None) for piece in pieces]
        product = torch.cat(products, -1) * self.weight_scale.to(products[0].dtype)
        return product if self.bias is None else product + self.bias.to(product.dtype)


def _bands_or_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as torch's kernel computes it; in bfloat16, in bands of queries.

    torch's kernel multiplies slowly in bfloat16 where a CPU has no matrix unit. oneDNN's products,
    of a hundred queries and all keys before them, take half the time or less. Shapes are those of
    `masked_attention`; a mask is of truth values, (B, 1, T, S).
    """
    batch, heads, tokens, size = query.shape
    has_mask = attention_mask is not None
    if (
        query.dtype != torch.bfloat16
        or not query.is_cpu
        or (attention_mask is not None and attention_mask.dtype != torch.bool)
        or not (has_mask or tokens in (1, key.shape[2]))
        or dropout
        or kwargs.get("is_causal") is not None
        or torch.compiler.is_compiling()
        or not is_plain_inference(query, key)
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    queries = (query * scaling).reshape(-1, tokens, size)  # (B x H, T, D)
    keys = key.reshape(len(queries), -1, size).transpose(1, 2)
    values = value.reshape(len(queries), -1, size)
    gathered = torch.empty_like(queries)
    band = min(tokens, max(16, _SCORES // (len(queries) * keys.shape[2])))
    scores = query.new_empty(len(queries) * band * keys.shape[2])
    weights = torch.empty_like(scores)
    is_future = torch.ones(band, band, dtype=torch.bool).triu(1)
    for start in range(0, tokens, band):
        end = min(start + band, tokens)
        seen = keys.shape[2] if has_mask or tokens == 1 else end
        shape = (len(queries), end - start, seen)
        own_scores, own_weights = (x[: math.prod(shape)].view(shape) for x in (scores, weights))
        torch.bmm(queries[:, start:end], keys[:, :, :seen], out=own_scores)
        if attention_mask is not None:
            is_seen = attention_mask[:, :, start:end, :seen]
            # Not minus infinity: a row in which everything is masked would become NaN.
            own_scores.view(batch, heads, *shape[1:]).masked_fill_(
                ~is_seen, torch.finfo(scores.dtype).min
            )
        elif tokens > 1:
            here = end - start
            own_scores[:, :, start:].masked_fill_(is_future[:here, :here], -torch.inf)
        torch.softmax(own_scores, dim=-1, out=own_weights)
        gathered[:, start:end] = torch.bmm(own_weights, values[:, :seen])
    joined = gathered.view(batch, heads, tokens, size).transpose(1, 2)
    return joined.contiguous(), None  # (B, T, H, D)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _bands_or_sdpa)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
