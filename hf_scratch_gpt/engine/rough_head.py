"""The head of a model in eight bits, to find the best token without reading all of the head.

A model that writes one text reads all its weights for each token; of the 124 million of GPT-2,
31 % are the head's, and greedy search asks only which token is best. A step takes 0.8 to 0.9 of
the time.
"""

# V vocabulary, C hidden

from typing import Any

import torch
from torch import nn

from .packing import MadeOf
from .products import INTEGER, POINTER, TYPES, Product, structure

_PIECE = 2**17  # numbers that are rounded at a time, which a cache holds
_SMALLEST = 1e-30  # what the largest number of a row counts as, at least
_MOST = 1 / 4  # of the rows: if more of them are read after all, little or nothing is gained

Rough = structure("Rough", product=Product, errors=POINTER, lengths=POINTER, most=INTEGER)


class RoughHead(MadeOf):
    """A matrix in int8, less the mean of its rows; see `find_best` in `one_token.cpp`.

    The mean adds the same to all scores, and is large where weights have been trained. As in
    `Int8Linear`, the largest number of a row becomes 127 or -127.

    Args:
        weight: (V, C).
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight)
        rows = weight.detach().split(max(1, _PIECE // weight.shape[1]))
        mean = torch.stack([some.double().sum(0) for some in rows]).sum(0) / len(weight)
        parts = zip(*(_rounded(some, mean) for some in rows), strict=True)
        self.weight, self.scale, self.errors, self.lengths = map(torch.cat, parts)

    @classmethod
    def of(cls, weight: torch.Tensor) -> Any:
        """None if it has another data type, or numbers that are NaN, infinite or too large."""
        made = cls(weight) if weight.dtype in TYPES else None
        return made if made and bool(made.errors.isfinite().all()) else None

    def as_structure(self) -> Any:
        """For the C++; it points into this object."""
        rows, columns = self.weight.shape
        addresses = self.weight.data_ptr(), None, self.scale.data_ptr(), None
        product = Product(*addresses, rows, columns, TYPES[torch.int8])
        errors, lengths = self.errors.data_ptr(), self.lengths.data_ptr()
        return Rough(product, errors, lengths, int(rows * _MOST))


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


def rough_of(head: nn.Linear) -> RoughHead | None:
    """What was made of `head` and is kept there, if its weight is still the same."""
    rough = vars(head).get("rough")
    return rough if rough and rough.is_of(head.weight) else None
