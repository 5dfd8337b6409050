"""The head of a model in eight bits, to find the word that scores highest without reading it all.

A model that writes one text reads all its weights for each token; of GPT-2's 124 million, 31 % are
the head's. Greedy search wants to know one thing of it only, which word is best.
"""

# V words, C hidden

import ctypes
from typing import Any

import torch
from torch import nn

from .packed import Original
from .products import DTYPES, Product

_PIECE = 2**17  # numbers that are rounded at a time, which a cache holds
_SMALLEST = 1e-30  # that a row's largest number counts as, at least
_MOST = 1 / 4  # of the rows: if more of them are read after all, little is gained or nothing


class Rough(ctypes.Structure):
    """The C++'s structure of the same name."""

    _fields_ = (
        ("product", Product),
        ("errors", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("most", ctypes.c_int64),
    )


class RoughHead:
    """A matrix in int8, less the mean of its rows; see `best_word` in `one_token.cpp`.

    The mean adds the same to all scores, and is large where weights have been trained. As in
    `Int8Linear`, the largest number of a row becomes 127 or -127.

    Args:
        weight: (V, C), in float32 or bfloat16.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._original = Original(weight)
        weight = weight.detach()
        self._column = weight[:, 0].clone()
        rows = weight.split(max(1, _PIECE // weight.shape[1]))
        mean = torch.stack([some.double().sum(0) for some in rows]).sum(0) / len(weight)
        parts = zip(*(_rounded(some, mean) for some in rows), strict=True)
        self.weight, self.scale, self.errors, self.lengths = map(torch.cat, parts)

    def is_of(self, weight: torch.Tensor) -> bool:
        """Whether it was made of `weight`, which has not changed, and no row has been replaced."""
        return self._original.is_still(weight) and torch.equal(self._column, weight[:, 0])

    def structure(self) -> Rough:
        """For the C++; it points into this object."""
        rows, columns = self.weight.shape
        return Rough(
            product=Product(self.weight.data_ptr(), self.scale.data_ptr(), None, rows, columns),
            errors=self.errors.data_ptr(),
            lengths=self.lengths.data_ptr(),
            most=int(rows * _MOST),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "RoughHead":
        """That of the weight's copy; they share the numbers."""
        made = self.__class__.__new__(self.__class__)
        made.__dict__ = self.__dict__ | {"_original": self._original.copied(memo)}
        return made


def _rounded(
    weight: torch.Tensor, mean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of `weight` (V, C) less the `mean` (C,), in int8, (V, C), with three numbers for each.

    These are, (V,) each, the scale, by how much the product with a vector of length 1 may be off,
    and the length of the rounded row.
    """
    exact = weight.double()  # squares may be too small for float32
    apart = exact - mean
    scale = (apart.abs().amax(1).clamp(min=_SMALLEST) / 127).float()
    rounded = (apart / scale.double()[:, None]).round().clamp(-127, 127)
    rough = rounded * scale.double()[:, None]
    length = rough.norm(dim=1)
    # Both products, sums of C terms, are rounded: by less than this much of their size.
    of_sums = 2 * (weight.shape[1] + 16) * 2**-24 * (exact.norm(dim=1) + length)
    error = (apart - rough).norm(dim=1) + of_sums
    # A little more, as they are rounded as well, and products may be too small for float32.
    return rounded.to(torch.int8), scale, error.float() * 1.001 + 1e-24, length.float() * 1.001


def keep_rough(head: nn.Linear) -> RoughHead | None:
    """Make that of `head`, and keep it there.

    Not if it has a bias, another data type, or numbers that are infinite, none or too large.
    """
    if head.bias is not None or head.weight.dtype not in DTYPES:
        return None
    rough = RoughHead(head.weight)
    if not bool(rough.errors.isfinite().all()):
        return None
    head.rough = rough
    return rough


def rough_of(head: nn.Linear) -> RoughHead | None:
    """What `keep_rough` has kept, if `head` is still the same."""
    rough = vars(head).get("rough")
    return rough if rough and head.bias is None and rough.is_of(head.weight) else None
