"""Linear layers of a model that only generates, on a CPU: weights packed, or in eight bits."""

import torch
from torch import nn

from .linear_scratch_gpt import by_onednn, is_one_token, is_plain_inference, linear, written_out

_PIECE = 2**22  # numbers that are turned back from int8 at a time


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
