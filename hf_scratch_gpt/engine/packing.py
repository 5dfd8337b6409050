"""What is made of a weight for its products, and can tell whether it still is of that weight."""

# C length of an input vector, D of an output vector, N vectors

import ctypes
import math
import mmap
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .half import IS_X86, is_slow
from .private_ops import has_onednn, onednn_linear, pack, version_of
from .products import INTEGER, TYPES, Product, address_of, call, panel_size, structure

_LARGE_PAGE = 2**21  # bytes
_SAMPLED = 64  # numbers of a weight that are compared

_Layer = structure(
    "Layer", product=Product, count=INTEGER, has_gelu=ctypes.c_bool, tanh=ctypes.c_bool
)


def empty_in_large_pages(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """As `torch.empty` on a CPU, in large pages of memory where the system has them.

    Memory is cleared when it is first touched: in 0.3 ms for 2 MB at a time, in 6 us for 4 KB. The
    tensor cannot be resized.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel may have none
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class MadeOf:
    """What `of` has made of a weight, and can tell whether that is still the same.

    A change of a few numbers by way of `weight.data` may go unseen. In a copy or a pickle of a
    model it is made anew.
    """

    of: Any  # the weight's, or None if there can be none

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weakref.ref(weight)
        self._state, self._sample = _state(weight), _sample(weight).clone()

    def is_of(self, weight: torch.Tensor | None) -> bool:
        """Whether it was made of `weight`, which has not changed."""
        return (
            weight is not None
            and self._weight() is weight
            and self._state == _state(weight)
            and torch.equal(self._sample, _sample(weight))
        )

    def __reduce__(self) -> tuple[Any, ...]:
        weight = self._weight()
        return (type(None), ()) if weight is None else (self.of, (weight,))


def _state(weight: torch.Tensor) -> tuple[object, ...]:
    return version_of(weight), weight.data_ptr(), weight.dtype, weight.shape


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """A few numbers that lie far apart: they tell what `_state` misses, as a merged adapter."""
    count = min(_SAMPLED, *weight.shape)
    rows, columns = (size // max(1, count) for size in weight.shape)
    step = rows * weight.stride(0) + columns * weight.stride(1)
    return weight.detach().as_strided((count,), (step,))


class Panels(MadeOf):
    """A weight (D, C) as `panels.h` reads it: of a panel's rows, columns or pairs of them."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight)
        numbers, (rows, columns) = weight.detach().contiguous(), weight.shape
        if weight.dtype == torch.int8:  # in pairs
            numbers = F.pad(numbers, (0, columns % 2)).view(torch.bfloat16)
        self._type, self._shape, size = TYPES[weight.dtype], weight.shape, panel_size()
        packed = -(-rows // size) * size, numbers.shape[1]
        self.panels = empty_in_large_pages(*packed, dtype=numbers.dtype)
        product = Product(None, None, None, None, *numbers.shape, TYPES[numbers.dtype])
        call("pack", product, 0, numbers, self.panels)

    @classmethod
    def of(cls, weight: torch.Tensor) -> Any:
        return cls(weight) if weight.dtype in TYPES and weight.numel() else None

    def multiply(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        gelu: str | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The product (..., D) of `x` (..., C), times `scale` (D,), plus `bias`, in x's type.

        `gelu` is a form of GELU, "tanh" or "none", to apply to the product.
        """
        (rows, columns), held = self._shape, [x.float().contiguous()]
        addresses = (None if each is None else address_of(each, held) for each in (scale, bias))
        product = Product(None, self.panels.data_ptr(), *addresses, rows, columns, self._type)
        y = torch.empty(*x.shape[:-1], rows, dtype=torch.float32, device="cpu")
        count = x.shape[:-1].numel()
        call("layer", _Layer(product, count, gelu is not None, gelu == "tanh"), 0, held[0], y)
        return y.to(x.dtype)


class Packed(MadeOf):
    """A weight (D, C) in oneDNN's order."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight)
        self.weight = pack(weight.detach())

    @classmethod
    def of(cls, weight: torch.Tensor) -> Any:
        return cls(weight)

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None, gelu: str | None = None
    ) -> torch.Tensor:
        """As that of `Panels`."""
        return onednn_linear(x, self.weight, bias, gelu)


def prefers_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies `dtype` faster than float32: bfloat16, where the CPU does."""
    return dtype == torch.bfloat16 and IS_X86 and not is_slow(dtype) and has_onednn()


def packed_for(weight: torch.Tensor) -> Any:
    """`weight` for products of several vectors; None if it is of a type that is left to torch."""
    return (Packed if prefers_onednn(weight.dtype) else Panels).of(weight)


def packed_of(linear: Any) -> Any:
    """The packed copy that `linear` keeps, made when it is first asked for; None if it is stale."""
    kept = vars(linear)
    if "packed" not in kept and hasattr(linear, "by_packed"):
        kept["packed"] = packed_for(linear.weight)
    packed = kept.get("packed")
    return packed if packed is not None and packed.is_of(linear.weight) else None


def panels_of(linear: nn.Linear) -> Panels | None:
    """The packed copy, as `packed_of`, if it is in panels."""
    packed = packed_of(linear)
    return packed if isinstance(packed, Panels) else None
