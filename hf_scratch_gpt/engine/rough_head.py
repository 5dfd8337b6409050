"""The head of a model in eight bits, to find the best token without reading all of the head.

A model that writes one text reads all its weights for each token; of the 124 million of GPT-2,
31 % are the head's, and greedy search asks only which token is best. A step takes 0.8 to 0.9 of
the time.
"""

# V vocabulary, C hidden

from typing import Any

import torch
from torch import nn

from .packed import Original
from .products import DTYPES, INTEGER, POINTER, Product, structure

_PIECE = 2**17  # numbers that are rounded at a time, which a cache holds
_SMALLEST = 1e-30  # what the largest number of a row counts as, at least
_MOST = 1 / 4  # of the rows: if more of them are read after all, little or nothing is gained

Rough = structure("Rough", product=Product, errors=POINTER, lengths=POINTER, most=INTEGER)


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

    def as_structure(self) -> Any:
        """For the C++; it points into this object."""
        rows, columns = self.weight.shape
        product = Product(self.weight.data_ptr(), self.scale.data_ptr(), None, rows, columns)
        errors, lengths = self.errors.data_ptr(), self.lengths.data_ptr()
        return Rough(product, errors, lengths, int(rows * _MOST))

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


def keep_rough(head: nn.Linear) -> None:
    """Make that of `head`, and keep it there.

    Not if it has a bias, another data type, or numbers that are NaN, infinite or too large.
    """
    if head.bias is None and head.weight.dtype in DTYPES:
        rough = RoughHead(head.weight)
        if bool(rough.errors.isfinite().all()):
            head.rough = rough


def rough_of(head: nn.Linear) -> RoughHead | None:
    """What `keep_rough` has kept, if `head` is still the same."""
    rough = vars(head).get("rough")
    return rough if rough and head.bias is None and rough.is_of(head.weight) else None
