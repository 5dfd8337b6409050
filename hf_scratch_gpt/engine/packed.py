"""Linear layers of a model that only generates, on a CPU: weights are packed or in eight bits."""

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.backends import mkldnn

from .half import HAS_MATRIX_UNIT, is_slow
from .linear import linear
from .onednn import by_onednn
from .plain import is_plain, is_plain_inference

_SAMPLED = 64  # numbers of a weight that are compared
_PIECE = 2**22  # numbers that are turned back from int8 at a time
_ROWS, _PRODUCTS = 256, 2**22  # vectors, and numbers of theirs, made in integers at a time
_TINY = torch.finfo(torch.float32).tiny


class Original:
    """A tensor that something else was made of, to tell whether it is still the same."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._state = _state(tensor)
        self._sample = _sample(tensor).clone()

    def is_still(self, tensor: torch.Tensor | None) -> bool:
        """Whether it is `tensor`, and unchanged."""
        return (
            tensor is not None
            and self._tensor() is tensor
            and self._state == _state(tensor)
            and torch.equal(self._sample, _sample(tensor))
        )

    def copied(self, memo: dict[int, Any]) -> "Original":
        """The same of the tensor's copy in `copy.deepcopy`, whose `memo` it is."""
        tensor = self._tensor()
        if tensor is None or not self.is_still(tensor):
            return self
        return Original(copy.deepcopy(tensor, memo))


def _state(weight: torch.Tensor) -> tuple[object, ...]:
    """Changes when `weight` does, unless it is written to by way of `weight.data`."""
    version = None if weight.is_inference() else weight._version
    return version, weight.data_ptr(), weight.dtype, weight.shape


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """A few numbers that lie far apart: they tell what `_state` misses, as an adapter merged."""
    count = min(_SAMPLED, *weight.shape)
    rows, columns = (size // max(1, count) for size in weight.shape)
    step = rows * weight.stride(0) + columns * weight.stride(1)
    return weight.detach().as_strided((count,), (step,))


class PackedLinear(nn.Linear):
    """Keeps a copy of its weight in the order in which oneDNN reads it."""

    packed: "Packed"

    @classmethod
    def take_over(cls, layer: nn.Linear) -> None:
        """Make `layer` one of these."""
        packed = Packed((layer.weight,))
        layer.__class__ = cls
        layer.packed = packed  # type: ignore[assignment]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.is_packed_for(input):
            return by_onednn(input, self.packed.weight, self.bias)
        return linear(input, self.weight, self.bias)

    def is_packed_for(self, input: torch.Tensor) -> bool:
        """Whether the copy can be used: not if the weight has changed, or a gradient is wanted."""
        return self.packed.is_for(input, (self.weight,))


class Packed:
    """Weights in oneDNN's order, one below the other; copies of a layer share them.

    torch cannot copy them.

    Args:
        weights: (D, C) each, as linear layers hold them.
    """

    def __init__(self, weights: tuple[torch.Tensor, ...]) -> None:
        whole = weights[0] if len(weights) == 1 else torch.cat(weights)  # which copies
        self.weight = torch.ops.mkldnn._reorder_linear_weight(whole.detach(), None)
        self._originals = tuple(map(Original, weights))

    def is_for(self, x: torch.Tensor, weights: tuple[torch.Tensor, ...]) -> bool:
        """Whether these may be multiplied by `x` (..., C) in place of `weights`."""
        return (
            not torch.compiler.is_compiling()
            and is_plain_inference(x, weights[0])
            and self.is_of(weights)
        )

    def is_of(self, weights: tuple[torch.Tensor | None, ...]) -> bool:
        """Whether `weights` are what was packed, and unchanged."""
        pairs = zip(self._originals, weights, strict=True)
        return all(original.is_still(weight) for original, weight in pairs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Packed":
        made = self.__class__.__new__(self.__class__)
        made.weight = self.weight
        made._originals = tuple(original.copied(memo) for original in self._originals)
        return made


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
        if _fits_integers(input, self.weight):
            product = _by_integers(input, self.weight) * self.weight_scale
        else:
            product = self._by_turning_back(input)
        if self.bias is not None:
            product = product + self.bias.to(product.dtype)
        return product.to(input.dtype)

    def _by_turning_back(self, input: torch.Tensor) -> torch.Tensor:
        """The product of `input` (..., C) and the weight, a piece of it at a time."""
        # Without its scale, a product may be too large for float16.
        is_wide = input.dtype == torch.float16 or is_slow(input.dtype)
        x = input.float() if is_wide else input
        pieces = self.weight.split(max(1, _PIECE // self.in_features))
        products = [linear(x, piece.to(x.dtype), None) for piece in pieces]
        return torch.cat(products, -1) * self.weight_scale.to(products[0].dtype)


def _fits_integers(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `_by_integers` is faster, and nothing is in the way."""
    has_own_unit = x.dtype == torch.bfloat16 and HAS_MATRIX_UNIT
    return (
        x.is_cpu
        and weight.is_cpu
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.numel() > 0
        and not (has_own_unit or torch.compiler.is_compiling() or torch.is_grad_enabled())
        and is_plain(weight)
        and _multiplies_integers()
    )


@functools.cache
def _multiplies_integers() -> bool:
    """Whether the CPU multiplies int8 in one instruction, and torch, by oneDNN, makes use of it.

    Without that instruction oneDNN's sums of two products do not always have room.
    """
    capabilities = torch.cpu.get_capabilities()
    if not any(capabilities.get(name, False) for name in ("avx512_vnni", "avx_vnni")):
        return False
    largest = torch.full((64, 64), 127, dtype=torch.int8, device="cpu")
    return mkldnn.is_available() and bool((torch._int_mm(largest, largest) == 64 * 127**2).all())


def _by_integers(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product of `x` (..., C) and `weight` (D, C), in int8, (..., D), in float32.

    Each vector becomes whole numbers of 14 bits, its largest 127 * 128; these are two digits of
    eight bits, for which int8 has room.
    """
    products, count = [], max(1, min(_ROWS, _PRODUCTS // len(weight)))
    for rows in x.reshape(-1, x.shape[-1]).float().split(count):
        unit = rows.abs().amax(1, keepdim=True).clamp(min=_TINY) / (127 * 128)
        high, low = _digits(rows / unit)
        of_high, of_low = torch._int_mm(torch.cat([high, low]), weight.T).float().chunk(2)
        products.append(of_low.add_(of_high, alpha=128).mul_(unit))
    return torch.cat(products).view(*x.shape[:-1], len(weight))


def _digits(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`numbers`, up to 127 * 128 in size, rounded: as 128 times the first plus the second."""
    high = (numbers / 128).round()
    low = (numbers - 128 * high).round()
    return high.to(torch.int8), low.to(torch.int8)
