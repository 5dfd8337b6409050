"""C++ that is compiled for the machine, and its products of a matrix and one vector."""

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

_SOURCE = Path(__file__).with_name("one_token.cpp")
_COMPILERS = ("g++", "clang++", "c++")
# The last three let functions of several numbers be computed at once. Sums keep their order, so
# that a row's is the same whichever way and by whichever thread it is read.
_FLAGS = (
    "-std=c++17 -O3 -march=native -fopenmp -shared -fPIC "
    "-fno-math-errno -fno-signed-zeros -fno-trapping-math"
)
# To read a matrix from one place, from four at once, and both with asking ahead; see the C++.
WAYS = range(4)
_TRIALS = 3  # of each way; the fastest counts
_ENOUGH = 2**28  # bytes of matrices to try ways on
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@functools.cache
def compiled() -> ctypes.CDLL:
    """Compile `one_token.cpp`, which takes two or three seconds, and load it; once in a process.

    Raises:
        FileNotFoundError: there is no C++ compiler.
        RuntimeError: the compiler does not compile it, or the result cannot be loaded.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or list(filter(shutil.which, _COMPILERS))[:1]
    if not compiler or shutil.which(compiler[0]) is None:
        raise FileNotFoundError(
            f"no C++ compiler is there ({', '.join(compiler or _COMPILERS)}) to compile a step of "
            "generation with; install g++, or name a compiler in the environment variable CXX"
        )
    # Where a library that is loaded cannot be deleted, it stays.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        library = Path(folder) / "one_token.so"
        command = [*compiler, *_FLAGS.split(), str(_SOURCE), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"{shlex.join(command)} failed; name another compiler in the environment variable "
                f"CXX, one with OpenMP, such as GNU's g++. It said:\n{done.stderr}"
            )
        try:
            return ctypes.CDLL(str(library))
        except OSError as error:
            raise RuntimeError(
                f"{error}; if programs may not be run from there, name another folder in TMPDIR; "
                "if a symbol is missing, name a compiler of C++, such as g++, in CXX"
            ) from error


class Product(ctypes.Structure):
    """The C++'s structure of the same name."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
    )


def product_of(linear: Any, held: list[Any]) -> Product:
    """The structure of `linear`; what it points to is put into `held`."""
    weight = linear.weight.detach()
    held.append(weight)
    is_int8 = weight.dtype == torch.int8
    return Product(
        weight=weight.data_ptr(),
        scale=address_of(linear.weight_scale, held) if is_int8 else None,
        bias=None if linear.bias is None else address_of(linear.bias, held),
        rows=weight.shape[0],
        columns=weight.shape[1],
    )


def address_of(numbers: torch.Tensor, held: list[Any]) -> int:
    """Address of `numbers` in float32."""
    held.append(numbers.detach().float().contiguous())
    return held[-1].data_ptr()


def multiply_seconds(linear: nn.Linear, way: int) -> float:
    """Seconds that the C++ takes for the matrix of `linear` and one vector, in one of `WAYS`."""
    held: list[Any] = []
    product = product_of(linear, held)
    x = torch.ones(product.columns, dtype=torch.float32, device="cpu")
    y = torch.empty(product.rows, dtype=torch.float32, device="cpu")
    multiply = compiled()[f"multiply_{DTYPES.get(linear.weight.dtype, 'int8')}"]
    multiply.restype = None
    start = time.perf_counter()
    multiply(
        ctypes.byref(product),
        ctypes.c_int64(way),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_void_p(y.data_ptr()),
        ctypes.c_int(torch.get_num_threads()),
    )
    return time.perf_counter() - start


def fastest_way(layers: list[nn.Linear]) -> int:
    """The one of `WAYS` in which this machine reads the matrices of `layers` fastest.

    Processors differ, by a quarter and more, so all are tried here and now, on as many of the
    layers as no cache holds.
    """
    tried, size = [], 0
    for layer in layers:
        if size < _ENOUGH:
            tried.append(layer)
            size += layer.weight.numel() * layer.weight.itemsize
    seconds = [
        [sum(multiply_seconds(layer, way) for layer in tried) for way in WAYS]
        for _ in range(_TRIALS)
    ]
    shortest = [min(of_way) for of_way in zip(*seconds, strict=True)]
    return min(WAYS, key=shortest.__getitem__)
