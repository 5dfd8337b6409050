"""The C++'s products of a matrix and vectors, and the fastest of its ways to read it for one."""

import ctypes
import time
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from .compiling import compiled

# To read a matrix from one place, from four at once, and both with asking ahead; see the C++. The
# best of them is 1.1 to 1.5 times as fast as the worst, on each processor another one.
WAYS = range(4)
_TRIALS = 2  # of each way; the fastest counts
_ENOUGH = 2**27  # bytes of matrices to try ways on
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # numbers of the C++'s `Type`
POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int64


def structure(name: str, **fields: Any) -> Any:
    """The class of a structure of the C++; `fields` are its members, in its order."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


Product = structure(
    "Product",
    **dict.fromkeys(("weight", "panels", "scale", "bias"), POINTER),
    **dict.fromkeys(("rows", "columns", "type"), INTEGER),
)


def product_of(linear: Any, held: list[Any]) -> Any:
    """The structure of `linear`, without panels; what it points to is put into `held`."""
    weight = linear.weight.detach().contiguous()
    held.append(weight)
    is_int8 = weight.dtype == torch.int8
    scale = address_of(linear.weight_scale, held) if is_int8 else None
    bias = None if linear.bias is None else address_of(linear.bias, held)
    return Product(weight.data_ptr(), None, scale, bias, *weight.shape, TYPES[weight.dtype])


def address_of(numbers: torch.Tensor, held: list[Any]) -> int:
    """Address of `numbers` in float32, which are put into `held`."""
    held.append(numbers.detach().float().contiguous())
    return held[-1].data_ptr()


def panel_size() -> int:
    """Rows of a panel; see `panels.h`."""
    return int(compiled().panel_size())


def multiply_seconds(linear: nn.Linear, way: int) -> float:
    """Seconds that the C++ takes for the matrix of `linear` and one vector, in one of `WAYS`."""
    held: list[Any] = []
    product = product_of(linear, held)
    x = torch.ones(product.columns, dtype=torch.float32, device="cpu")
    y = torch.empty(product.rows, dtype=torch.float32, device="cpu")
    start = time.perf_counter()
    call("product", product, way, x, y)
    return time.perf_counter() - start


def call(function: str, given: Any, number: int, x: torch.Tensor, y: torch.Tensor) -> int:
    """Call one of the C++'s functions, on a structure, a number and two vectors of float32."""
    by_name = compiled()[function]
    by_name.restype = INTEGER
    vectors = POINTER(x.data_ptr()), POINTER(y.data_ptr())
    threads = ctypes.c_int(torch.get_num_threads())
    return int(by_name(ctypes.byref(given), INTEGER(number), *vectors, threads))


def fastest_way(layers: list[nn.Linear]) -> int:
    """The one of `WAYS` in which this machine reads the matrices of `layers` fastest.

    All are tried here and now, on as many of the layers as no cache holds.
    """
    sizes = accumulate((layer.weight.nbytes for layer in layers), initial=0)
    tried = [layer for layer, size in zip(layers, sizes, strict=False) if size < _ENOUGH]
    seconds = [
        [sum(multiply_seconds(layer, way) for layer in tried) for way in WAYS]
        for _ in range(_TRIALS)
    ]
    shortest = [min(of_way) for of_way in zip(*seconds, strict=True)]
    return min(WAYS, key=shortest.__getitem__)
