"""Parts of a model that only generates, on a CPU: weights are packed or in eight bits.

A weight in an order of its own is multiplied faster than one that lies as torch keeps it, and GELU
is computed on the way.
"""

# C length of an input vector, D of an output vector

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .half import is_ordinary, is_slow, multiply, product
from .packing import packed_of, panels_of, prefers_onednn
from .private_ops import is_watched

_PIECE = 2**20  # numbers that are turned into int8, or back, at a time


class PackedLinear(nn.Linear):
    """Multiplies by a packed copy of its weight; half precision that is slow, in float32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map `input` (..., C) to (..., D)."""
        by_packed = self.by_packed(input)
        if by_packed is not None:
            return by_packed
        if is_slow(input.dtype) and self._only_multiplies(input):
            return product(input, self.weight, self.bias)
        return super().forward(input)

    def by_packed(self, input: torch.Tensor, gelu: str | None = None) -> torch.Tensor | None:
        """As `forward`, and GELU in the form `gelu`; None of one vector or a changed weight."""
        if input.numel() == self.in_features or not self._only_multiplies(input):
            return None
        packed = packed_of(self)
        return None if packed is None else packed.multiply(input, self.bias, gelu)

    def _only_multiplies(self, input: torch.Tensor) -> bool:
        """Whether no gradient is wanted, autocast changes no type, and all is torch's own."""
        changes = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
        is_alike = input.dtype == self.weight.dtype
        return is_alike and not changes and is_ordinary(input, self.weight, self.bias)


class PackedFeedForward(nn.Module):
    """Computes GELU while the first layer's product is written."""

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `hidden_states` (B, T, C) to (B, T, C)."""
        up, form, inner = self.up_proj, fused_gelu(self.activation), None
        if form is not None and isinstance(up, PackedLinear | Int8Linear) and not is_watched(up):
            inner = up.by_packed(hidden_states, form)
        if inner is None:
            inner = self.activation(up(hidden_states))
        return self.dropout(self.down_proj(inner))


def fused_gelu(activation: Any) -> str | None:
    """The form of `activation`, if it is the model's GELU by torch's kernel, and nobody watches."""
    form, is_fused = getattr(activation, "form", None), getattr(activation, "fused", False)
    if torch.compiler.is_compiling() or form not in ("tanh", "none") or is_watched(activation):
        return None
    return form if is_fused else None


class Int8Linear(nn.Linear):
    """Keeps its weight in int8, (D, C), with one scale for each row, (D,): weight * scale.

    The largest number of a row becomes 127 or -127, the rest are rounded to the nearest. One text
    is written 1.9 to 2.8 times as fast as in float32, 1.1 to 1.7 times as in bfloat16.
    """

    weight_scale: torch.Tensor
    packed: Any

    def prepare(self) -> None:
        """Quantize the weight; there is no way back."""
        weight = self.weight.detach()
        wide = torch.promote_types(weight.dtype, torch.float32)
        scale = torch.empty(len(weight), dtype=wide, device=weight.device)
        quantized = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        parts = (whole.split(self._rows()) for whole in (weight, scale, quantized))
        for some, scales, rounded in zip(*parts, strict=True):
            scales.copy_(some.abs().amax(1)).clamp_(min=torch.finfo(wide).tiny).div_(127)
            rounded.copy_((some / scales[:, None]).round_())
        self.weight = nn.Parameter(quantized, requires_grad=False)  # not in place: it may be tied
        # Not a buffer: `model.half()` would leave it too few digits.
        self.weight_scale = scale
        is_left = wide == torch.float64 or prefers_onednn(weight.dtype)
        if is_left:
            self.packed = None
        self.register_state_dict_pre_hook(_refuse)
        self.register_load_state_dict_pre_hook(_refuse)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map `input` (..., C) to (..., D); without panels, by a piece of the weight at a time."""
        if self.weight.dtype != torch.int8:  # tied anew to the embedding
            return super().forward(input)
        by_packed = self.by_packed(input)
        if by_packed is not None:
            return by_packed
        # Without its scale a product may be too large for float16.
        is_wide = input.dtype == torch.float16 or is_slow(input.dtype)
        x = input.float() if is_wide else input
        by = F.linear if torch.is_grad_enabled() or torch.compiler.is_compiling() else multiply
        pieces = self.weight.split(self._rows())
        products = [by(x, piece.to(x.dtype), None) for piece in pieces]
        product = torch.cat(products, -1) * self.weight_scale.to(products[0].dtype)
        if self.bias is not None:
            product = product + self.bias.to(product.dtype)
        return product.to(input.dtype)

    def _rows(self) -> int:
        return max(1, _PIECE // self.in_features)

    def by_packed(self, input: torch.Tensor, gelu: str | None = None) -> torch.Tensor | None:
        """As that of `PackedLinear`."""
        panels = None if torch.is_grad_enabled() else panels_of(self)
        if panels is None or not is_ordinary(input, self.weight):
            return None
        return panels.multiply(input, self.bias, gelu, self.weight_scale)


def _refuse(*args: Any) -> None:
    raise ValueError("the weights are in int8; save and load the model before it is optimized")
