"""One token at a time on a CPU, by C++ that is compiled for the machine: `one_token.cpp`."""

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
from transformers import DynamicCache

from .linear_scratch_gpt import is_changed, is_plain
from .positions_scratch_gpt import raise_past_limit

_SOURCE = Path(__file__).with_suffix(".cpp")
_COMPILERS = ("g++", "clang++", "c++")
# The last three let functions of several numbers be computed at once. Sums keep their order, so
# that a row's is the same whichever way and by whichever thread it is read.
_FLAGS = (
    "-std=c++17 -O3 -march=native -fopenmp -shared -fPIC "
    "-fno-math-errno -fno-signed-zeros -fno-trapping-math"
)
ATTENTION = "bands_or_sdpa"  # what transformers is told to call that of `fast_blocks`
# To read a matrix from one place, from four at once, and both with asking ahead; see the C++.
WAYS = range(4)
_TRIALS = 3  # of each way; the fastest counts
_ENOUGH = 2**28  # bytes of matrices to try ways on
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# The modules whose mathematics the C++ knows. By name, as a model's own folder may have brought
# its own copies of these files.
_KNOWN = {
    "modeling_scratch_gpt.ScratchGPTForCausalLM",
    "modeling_scratch_gpt.ScratchGPTModel",
    "blocks_scratch_gpt.TransformerBlock",
    "blocks_scratch_gpt.MultiHeadAttention",
    "blocks_scratch_gpt.FeedForward",
    "blocks_scratch_gpt.LayerNorm",
    "blocks_scratch_gpt.GELU",
    "linear_scratch_gpt.Linear",
    "fast_blocks.LastBlock",
    "fast_blocks.PackedFeedForward",
    "fast_blocks.PackedLinear",
    "fast_blocks.Int8Linear",
}
_KNOWN_OF_TORCH = (nn.Linear, nn.Embedding, nn.Dropout, nn.ModuleList)


@functools.cache
def compiled() -> ctypes.CDLL:
    """Compile `one_token.cpp`, which takes a second or two, and load it; once in a process.

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


def can_compute(model: Any) -> bool:
    """Whether the C++ gives what `model`, a language model of ours, would give.

    Not so if a part is another than ours or has another shape than the configuration says, has a
    hook, is in training mode, not on a CPU or in another data type than float32 and bfloat16, or if
    a parameter is another kind of tensor than torch's own.
    """
    parts = list(model.modules())
    matrices = [part.weight for part in parts if isinstance(part, nn.Linear)]
    return (
        all(type(part) in _KNOWN_OF_TORCH or name_of(type(part)) in _KNOWN for part in parts)
        and not any(part.training or is_changed(part) for part in parts)
        and _has_its_shapes(model)
        and all(parameter.is_cpu and is_plain(parameter) for parameter in model.parameters())
        and all(matrix.is_contiguous() for matrix in matrices)
        and {matrix.dtype for matrix in matrices} in ({model.dtype}, {torch.int8})
        and model.dtype in _DTYPES
        and model.config._attn_implementation in ("eager", "sdpa", ATTENTION)
    )


def _has_its_shapes(model: Any) -> bool:
    """Whether all parameters are of the sizes that the configuration gives."""
    config, inner = model.config, model.config.intermediate_size
    size = config.hidden_size
    is_right = _is_shaped(model.lm_head, config.vocab_size, size)
    norms = [model.model.norm]
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        is_right &= all(_is_shaped(projection, size, size) for projection in projections)
        is_right &= _is_shaped(mlp.up_proj, inner, size) and _is_shaped(mlp.down_proj, size, inner)
        norms += [block.input_layernorm, block.post_attention_layernorm]
    is_right &= all(norm.weight.shape == norm.bias.shape == (size,) for norm in norms)
    return is_right and len(model.model.layers) == config.num_hidden_layers


def _is_shaped(linear: Any, rows: int, columns: int) -> bool:
    is_right = linear.weight.shape == (rows, columns)
    return is_right and (linear.bias is None or linear.bias.shape == (rows,))


def name_of(kind: type) -> str:
    """File and class, without the package."""
    return f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"


class Memory:
    """Keys and values of one text, for as many tokens as a model has positions."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        size = self._size(config)
        layers = range(config.num_hidden_layers)
        with torch.inference_mode(False):  # else it could be written to in that mode alone
            self.keys = [torch.empty(size, dtype=dtype, device="cpu") for _ in layers]
            self.values = [torch.empty(size, dtype=dtype, device="cpu") for _ in layers]

    def fits(self, config: Any, dtype: torch.dtype) -> bool:
        """Whether it is what a model of `config` and `dtype` needs."""
        keys = self.keys[0]
        is_right = tuple(keys.shape) == self._size(config) and keys.dtype == dtype
        return is_right and len(self.keys) == config.num_hidden_layers

    @staticmethod
    def _size(config: Any) -> tuple[int, int, int]:
        return config.num_attention_heads, config.max_position_embeddings, config.head_dim


# The structures of the C++, in its order.


class _Product(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
    )


class _Norm(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("eps", ctypes.c_float),
    )


class _Block(ctypes.Structure):
    _fields_ = (
        ("input_layernorm", _Norm),
        ("query", _Product),
        ("key", _Product),
        ("value", _Product),
        ("out", _Product),
        ("post_attention_layernorm", _Norm),
        ("up", _Product),
        ("down", _Product),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("scaling", ctypes.c_float),
        ("tanh", ctypes.c_bool),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("blocks", ctypes.POINTER(_Block)),
        ("layers", ctypes.c_int64),
        ("norm", _Norm),
        ("head", _Product),
        ("heads", ctypes.c_int64),
        ("room", ctypes.c_int64),
        ("inner_size", ctypes.c_int64),
        ("way", ctypes.c_int64),
    )


def _product(linear: Any, held: list[Any]) -> _Product:
    """The structure of `linear`; what it points to is put into `held`."""
    weight = linear.weight.detach()
    held.append(weight)
    is_int8 = weight.dtype == torch.int8
    return _Product(
        weight=weight.data_ptr(),
        scale=_vector(linear.weight_scale, held) if is_int8 else None,
        bias=None if linear.bias is None else _vector(linear.bias, held),
        rows=weight.shape[0],
        columns=weight.shape[1],
    )


def _norm(norm: Any, held: list[Any]) -> _Norm:
    return _Norm(_vector(norm.weight, held), _vector(norm.bias, held), norm.eps)


def _vector(numbers: torch.Tensor, held: list[Any]) -> int:
    """Address of `numbers` in float32."""
    held.append(numbers.detach().float().contiguous())
    return held[-1].data_ptr()


def multiply_seconds(linear: nn.Linear, way: int) -> float:
    """Seconds that the C++ takes for the matrix of `linear` and one vector, in one of `WAYS`."""
    held: list[Any] = []
    product = _product(linear, held)
    x = torch.ones(product.columns, dtype=torch.float32, device="cpu")
    y = torch.empty(product.rows, dtype=torch.float32, device="cpu")
    multiply = compiled()[f"multiply_{_DTYPES.get(linear.weight.dtype, 'int8')}"]
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


class OneToken:
    """Reads the tokens of one text, after its prompt, one at a time.

    Args:
        model: one that `can_compute` is true of, and that nothing changes meanwhile.
        memory: keys and values; nobody else may use it meanwhile.
        prompt: what the model has made of the tokens before.
        way: one of `WAYS` to read matrices in; see `fastest_way`.
    """

    def __init__(self, model: Any, memory: Memory, prompt: DynamicCache, way: int = 0) -> None:
        self._length = prompt.get_seq_length()
        for keys, values, read in zip(memory.keys, memory.values, prompt.layers, strict=True):
            keys[:, : self._length] = read.keys[0]
            values[:, : self._length] = read.values[0]

        self._model = model
        self._held: list[Any] = [memory]  # what the structures point to
        blocks = [
            self._block(block, memory.keys[layer], memory.values[layer])
            for layer, block in enumerate(model.model.layers)
        ]
        self._structure = _Model(
            blocks=(_Block * len(blocks))(*blocks),
            layers=len(blocks),
            norm=_norm(model.model.norm, self._held),
            head=_product(model.lm_head, self._held),
            heads=model.config.num_attention_heads,
            room=model.config.max_position_embeddings,
            inner_size=model.config.intermediate_size,
            way=way,
        )
        weights = "int8_" if model.lm_head.weight.dtype == torch.int8 else ""
        self._step = compiled()[f"step_{weights}{_DTYPES[model.dtype]}"]
        self._step.restype = None

    def logits_after(self, token: torch.Tensor) -> torch.Tensor:
        """Read `token` (1, 1); return the scores of the next one, (1, 1, V), in float32."""
        limit = self._model.config.max_position_embeddings
        if self._length >= limit:
            raise_past_limit(self._length + 1, limit)
        model = self._model.model
        position = torch.tensor([[self._length]], device="cpu")
        embedded = (model.embed_tokens(token) + model.embed_positions(position)).float()
        logits = torch.empty(1, 1, self._structure.head.rows, dtype=torch.float32, device="cpu")
        self._step(
            ctypes.byref(self._structure),
            ctypes.c_int64(self._length),
            ctypes.c_void_p(embedded.data_ptr()),
            ctypes.c_void_p(logits.data_ptr()),
            ctypes.c_int(torch.get_num_threads()),
        )
        self._length += 1
        return logits

    def _block(self, block: Any, keys: torch.Tensor, values: torch.Tensor) -> _Block:
        attention, mlp = block.self_attn, block.mlp
        return _Block(
            input_layernorm=_norm(block.input_layernorm, self._held),
            query=_product(attention.q_proj, self._held),
            key=_product(attention.k_proj, self._held),
            value=_product(attention.v_proj, self._held),
            out=_product(attention.o_proj, self._held),
            post_attention_layernorm=_norm(block.post_attention_layernorm, self._held),
            up=_product(mlp.up_proj, self._held),
            down=_product(mlp.down_proj, self._held),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            scaling=attention.scaling,
            tanh=mlp.activation.form == "tanh",
        )
