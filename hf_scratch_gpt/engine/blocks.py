"""Parts of a model that only generates, on a CPU.

Query, key and value are one product, GELU is computed where a product leaves its numbers, and
attention in bfloat16 has a way of its own.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.deprecation import deprecate_kwarg

from ..model.blocks_scratch_gpt import (
    FeedForward,
    MultiHeadAttention,
    masked_attention,
)
from .half import OF_SDPA
from .one_token import ATTENTION, name_of
from .onednn import by_onednn
from .packed import Packed, PackedLinear
from .plain import is_changed, is_plain_inference

_SCORES = 3 * 2**19  # scores at a time: they stay in a core's cache


def _subclass(own: type, kind: type) -> type:
    """`own` and `kind` in one.

    `kind` need not be the class that `own` is derived from: a model's own folder may have brought
    its own, which transformers looks for.
    """
    if issubclass(own, kind):
        return own
    return type(own.__name__, (own, kind), {"__module__": own.__module__})


class PackedFeedForward(FeedForward):
    """Lets oneDNN compute GELU while it writes the first layer's product."""

    @classmethod
    def take_over(cls, mlp: nn.Module) -> None:
        """Make `mlp`, whose activation is GELU, one of these."""
        mlp.__class__ = _subclass(cls, type(mlp))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `hidden_states` (B, T, C) to (B, T, C)."""
        up: Any = self.up_proj
        is_watched = is_changed(up) or is_changed(self.activation)
        if type(up) is not PackedLinear or is_watched or not up.is_packed_for(hidden_states):
            return super().forward(hidden_states)
        inner = by_onednn(hidden_states, up.packed.weight, up.bias, gelu=self.activation.form)
        return self.dropout(self.down_proj(inner))


class PackedAttention(MultiHeadAttention):
    """Computes query, key and value at once, from a copy of their weights in oneDNN's order.

    Each is small: oneDNN takes less time for one product three times as wide.
    """

    packed: Packed

    @classmethod
    def take_over(cls, attention: MultiHeadAttention) -> None:
        """Make `attention`, of whose projections all have a bias or none, one of these."""
        packed = Packed(_weights(attention))
        attention.__class__ = _subclass(cls, type(attention))
        attention.packed = packed  # type: ignore[assignment]

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend, as the class that this one replaces."""
        layers = projections(self)
        if not self._is_packed_for(hidden_states, layers):
            return super().forward(hidden_states, attention_mask, cache, **kwargs)
        biases = [layer.bias for layer in layers]
        bias = None if biases[0] is None else torch.cat(biases)
        product = by_onednn(hidden_states, self.packed.weight, bias)
        query, key, value = product.split([len(layer.weight) for layer in layers], dim=-1)
        gathered, weights = _attend(self, query, key, value, attention_mask, cache, **kwargs)
        return self.dropout(gathered), weights

    def _is_packed_for(self, hidden_states: torch.Tensor, layers: tuple[Any, ...]) -> bool:
        return (
            not (torch.compiler.is_compiling() or self.training)
            and all(name_of(type(layer)) == "linear_scratch_gpt.Linear" for layer in layers)
            and not any(map(is_changed, layers))
            and len({layer.bias is None for layer in layers}) == 1
            and self.packed.is_for(hidden_states, _weights(self))
        )


def projections(attention: Any) -> tuple[Any, Any, Any]:
    """The layers that make query, key and value."""
    return attention.q_proj, attention.k_proj, attention.v_proj


def _weights(attention: MultiHeadAttention) -> tuple[Any, ...]:
    """Their weights; None of a layer that has none."""
    return tuple(getattr(layer, "weight", None) for layer in projections(attention))


def _attend(
    attention: MultiHeadAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `attention`, not in training, makes of its projections, (B, T, C) each.

    It is (B, T, C), before dropout; and the weights, if they are computed.
    """

    def heads(projected: torch.Tensor) -> torch.Tensor:
        return projected.view(*projected.shape[:2], -1, attention.head_dim).transpose(1, 2)

    query, key, value = heads(query), heads(key), heads(value)  # (B, H, T, D)
    if cache is not None:
        key, value = cache.update(key, value, attention.layer_idx, kwargs=kwargs)  # (B, H, S, D)
    by = ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation or "eager", masked_attention
    )
    gathered, weights = by(
        attention,
        query,
        key,
        value,
        attention_mask,
        scaling=attention.scaling,
        dropout=0.0,
        **kwargs,
    )
    return attention.o_proj(gathered.reshape(*gathered.shape[:2], -1)), weights


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
    is_plain = (
        query.is_cpu
        and query.dtype == torch.bfloat16
        and _are_known(query, key, value, attention_mask)
        and module.is_causal
        and not dropout
        and all(kwargs.get(name) is None for name in OF_SDPA)
        and not torch.compiler.is_compiling()
        and is_plain_inference(query, key)
    )
    if is_plain:
        return _in_bands(query * scaling, key, value, attention_mask), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, **kwargs
    )


def _are_known(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> bool:
    """Whether all have a key of their own, and the mask, if any, is of truth values for each."""
    batch, heads, tokens, size = query.shape
    if not key.shape == value.shape == (batch, heads, key.shape[2], size):
        return False
    if mask is None:
        return tokens in (1, key.shape[2])
    return mask.dtype == torch.bool and tuple(mask.shape) in (
        (batch, 1, tokens, key.shape[2]),
        (1, 1, tokens, key.shape[2]),
    )


def _in_bands(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """What each token gathers, (B, T, H, D), of a query that is scaled already."""
    batch, heads, tokens, size = query.shape
    queries = query.reshape(-1, tokens, size)  # (B x H, T, D)
    keys = key.reshape(len(queries), -1, size).transpose(1, 2)
    values = value.reshape(len(queries), -1, size)
    gathered = torch.empty_like(queries)
    band = min(tokens, max(16, _SCORES // (len(queries) * keys.shape[2])))
    if tokens > band:
        keys = keys.contiguous()  # oneDNN would rearrange them for each band
    scores = query.new_empty(len(queries) * band * keys.shape[2])
    weights = torch.empty_like(scores)
    future = query.new_full((band, band), -torch.inf).triu(1)
    for start in range(0, tokens, band):
        end = min(start + band, tokens)
        seen = end if mask is None and tokens > 1 else keys.shape[2]
        shape = (len(queries), end - start, seen)
        own_scores, own_weights = (x[: math.prod(shape)].view(shape) for x in (scores, weights))
        torch.bmm(queries[:, start:end], keys[:, :, :seen], out=own_scores)
        if mask is not None:
            is_seen = mask[:, :, start:end]
            # Not minus infinity: a row in which everything is masked would become NaN.
            own_scores.view(batch, heads, *shape[1:]).masked_fill_(
                ~is_seen, torch.finfo(scores.dtype).min
            )
        elif tokens > 1:
            here = end - start
            own_scores[:, :, start:] += future[:here, :here]
        torch.softmax(own_scores, dim=-1, out=own_weights)
        gathered[:, start:end] = torch.bmm(own_weights, values[:, :seen])
    return gathered.view(batch, heads, tokens, size).transpose(1, 2).contiguous()


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _bands_or_sdpa)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
