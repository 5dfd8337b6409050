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
from .products import INTEGER, POINTER, TYPES, Product, call, structure

_MOST = 1 / 4  # of the rows: if more of them are read after all, little or nothing is gained

Rough = structure("Rough", product=Product, errors=POINTER, lengths=POINTER, most=INTEGER)


class RoughHead(MadeOf):
    """A matrix in int8; see `preparing.h` for what it holds, `one_token.cpp` for how it is used.

    Args:
        weight: (V, C).
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight)
        numbers, (rows, columns) = weight.detach().contiguous(), weight.shape
        self.weight = torch.empty(weight.shape, dtype=torch.int8, device="cpu")
        self.of_rows = torch.empty(3, rows, dtype=torch.float32, device="cpu")
        scale, errors, lengths = (row.data_ptr() for row in self.of_rows)
        rounded = self.weight.data_ptr(), None, scale, None, rows, columns, TYPES[torch.int8]
        self.structure = Rough(Product(*rounded), errors, lengths, int(rows * _MOST))
        call("make_rough", self.structure, TYPES[weight.dtype], numbers, self.of_rows)

    @classmethod
    def of(cls, weight: torch.Tensor) -> Any:
        """None if it has another data type, or numbers that are NaN, infinite or too large."""
        made = cls(weight) if weight.dtype in (torch.float32, torch.bfloat16) else None
        return made if made and bool(made.of_rows.isfinite().all()) else None


def rough_of(head: nn.Linear) -> RoughHead | None:
    """What was made of `head` and is kept there, if its weight is still the same."""
    rough = vars(head).get("rough")
    return rough if rough and rough.is_of(head.weight) else None
