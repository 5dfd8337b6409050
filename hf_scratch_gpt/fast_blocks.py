"""Parts of a model that only generates, on a CPU.

Weights are packed or in eight bits, GELU is computed where a product leaves its numbers, and
attention in bfloat16 has a way of its own.
"""

import copy
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .blocks_scratch_gpt import FeedForward, TransformerBlock, masked_attention
from .half_scratch_gpt import is_slow
from .linear_scratch_gpt import by_onednn, is_changed, is_plain_inference, linear
from .one_token import ATTENTION

_SAMPLED = 64  # numbers of a weight that are compared
_PIECE = 2**22  # numbers that are turned back from int8 at a time
_OF_SDPA = ("is_causal", "position_bias", "cache", "softcap")  # what it alone can do
_SCORES = 3 * 2**19  # scores at a time: they stay in a core's cache


class PackedLinear(nn.Linear):
    """Keeps a copy of its weight in the order in which oneDNN reads it."""

    packed: "_Packed"

    @classmethod
    def take_over(cls, layer: nn.Linear) -> None:
        """Make `layer` one of these."""
        packed = _Packed(layer.weight)
        layer.__class__ = cls
        layer.packed = packed  # type: ignore[assignment]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.is_packed_for(input):
            return by_onednn(input, self.packed.weight, self.bias)
        return linear(input, self.weight, self.bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedLinear":
        """A copy shares the packed weight, if that is still the weight's."""
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        if self.packed.is_of(self.weight):
            made.packed = _Packed(made.weight, self.packed.weight)
        return made

    def is_packed_for(self, input: torch.Tensor) -> bool:
        """Whether the copy can be used: not if the weight has changed, or a gradient is wanted."""
        return (
            not torch.compiler.is_compiling()
            and is_plain_inference(input, self.weight)
            and self.packed.is_of(self.weight)
        )


class _Packed:
    """A weight in oneDNN's order, which torch cannot copy; copies of a layer share it.

    Args:
        weight: (D, C).
        packed: what packing it gives, if it is known.
    """

    def __init__(self, weight: torch.Tensor, packed: torch.Tensor | None = None) -> None:
        if packed is None:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self.weight: torch.Tensor = packed
        self._original = weakref.ref(weight)
        self._state, self._sample = _state(weight), _sample(weight).clone()

    def is_of(self, weight: torch.Tensor) -> bool:
        """Whether `weight` is what was packed, and unchanged."""
        return (
            self._original() is weight
            and self._state == _state(weight)
            and torch.equal(self._sample, _sample(weight))
        )

    def __deepcopy__(self, memo: dict[int, object]) -> "_Packed":
        return self


def _state(weight: torch.Tensor) -> tuple[object, ...]:
    """Changes when `weight` does, unless it is written to by way of `weight.data`."""
    version = None if weight.is_inference() else weight._version
    return version, weight.data_ptr(), weight.dtype, weight.shape


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """A few numbers that lie far apart: they tell what `_state` misses, as an adapter merged."""
    numbers = weight.detach().diagonal()
    return numbers[:: max(1, len(numbers) // _SAMPLED)]


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


class LastBlock(TransformerBlock):
    """The last block, of which a prompt needs the last token only.

    The others offer their keys and values; nobody looks at what they have gathered.
    """

    @classmethod
    def take_over(cls, block: TransformerBlock) -> None:
        """Make `block` one of these."""
        block.__class__ = _subclass(cls, type(block))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        only_last_token: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Map `hidden_states` (B, T, C) to (B, T, C), or to (B, 1, C) with `only_last_token`."""
        if not only_last_token:
            return super().forward(hidden_states, attention_mask, **kwargs)
        if attention_mask is not None:
            attention_mask = attention_mask[:, :, -1:]  # (B, 1, 1, S)
        last = hidden_states[:, -1:]
        gathered = self._attend_once(self.input_layernorm(hidden_states), attention_mask, **kwargs)
        last = last + gathered
        return last + self.mlp(self.post_attention_layernorm(last))

    def _attend_once(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """What the last of `hidden_states` (B, T, C) gathers from all of them, (B, 1, C)."""
        attention = self.self_attn

        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.view(*projected.shape[:2], -1, attention.head_dim).transpose(1, 2)

        query = heads(attention.q_proj(hidden_states[:, -1:]))  # (B, H, 1, D)
        key, value = heads(attention.k_proj(hidden_states)), heads(attention.v_proj(hidden_states))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, attention.layer_idx)  # (B, H, S, D)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention.config._attn_implementation, masked_attention
        )
        gathered, _ = attend(
            attention, query, key, value, attention_mask, scaling=attention.scaling, **kwargs
        )
        return attention.o_proj(gathered.flatten(2))


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
        layer.weight = nn.Parameter(quantized, requires_grad=False)  # not in place: it may be tied
        layer.register_buffer("weight_scale", scale)

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> "Int8Linear":
        """Move or convert; the scale keeps its data type, as others may have too few digits."""
        scale = self.weight_scale
        super()._apply(fn, recurse)
        self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        raise ValueError("the weights are in int8; save the model before it is optimized")

    def _load_from_state_dict(self, *args: Any) -> None:
        raise ValueError("the weights are in int8; load before the model is optimized")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map `input` (..., C) to (..., D)."""
        if self.weight.dtype != torch.int8:  # tied anew to the embedding
            return linear(input, self.weight, self.bias)
        # Without its scale, a product may be too large for float16.
        is_wide = input.dtype == torch.float16 or is_slow(input.dtype)
        x = input.float() if is_wide else input
        pieces = self.weight.split(max(1, _PIECE // self.in_features))
        products = [linear(x, piece.to(x.dtype), None) for piece in pieces]
        product = torch.cat(products, -1) * self.weight_scale.to(products[0].dtype)
        if self.bias is not None:
            product = product + self.bias.to(product.dtype)
        return product.to(input.dtype)


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
        and all(kwargs.get(name) is None for name in _OF_SDPA)
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
