"""Read a checkpoint of llm.c (github.com/karpathy/llm.c): a `.bin` file.

A header of 256 integers (magic number, version, sizes) and then all parameters in the order of the
struct ParameterTensors of train_gpt2.c, those of one kind for all layers together.
"""

from functools import partial
from math import prod
from pathlib import Path

import torch

from ..model.configuration_scratch_gpt import ScratchGPTConfig
from .digests import unchecked_files
from .nanogpt import trim_vocabulary
from .sources import GPT2Source, StoredTensor, map_tensor, told_as_error

MAGIC = 20240326
_HEADER = 256 * 4
_DTYPES = {3: torch.float32, 5: torch.bfloat16}


def is_llmc(source: str) -> bool:
    """Whether the file `source` begins like a checkpoint of llm.c."""
    with Path(source).open("rb") as file:
        return int.from_bytes(file.read(4), "little") == MAGIC


def read_llmc(source: str) -> GPT2Source:
    """Open the file `source`.

    Raises:
        ValueError: it is no such checkpoint, or its size is not that of its parameters.
    """
    path = Path(source)
    with path.open("rb") as file:
        header = file.read(_HEADER)
    if len(header) < _HEADER or int.from_bytes(header[:4], "little") != MAGIC:
        raise ValueError(f"{source} does not begin like a checkpoint of llm.c")
    numbers = torch.frombuffer(bytearray(header), dtype=torch.int32).tolist()
    version, positions, vocabulary, layers, heads, width, padded = numbers[1:8]
    if version not in _DTYPES:
        raise ValueError(f"{source} has version {version}; versions 3 and 5 can be read")
    if not 0 < vocabulary <= padded:
        raise ValueError(f"{source} says that {vocabulary} of {padded} rows are tokens")
    with told_as_error(source):
        config = ScratchGPTConfig(
            vocab_size=padded,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=positions,
        )
    dtype = _DTYPES[version]
    size = path.stat().st_size
    # A layer has the matrices c_attn (3C, C), c_proj (C, C), c_fc (4C, C) and c_proj (C, 4C), their
    # biases and two norms; a norm follows the last.
    numbers_stored = (padded + positions + 2) * width + layers * (12 * width + 13) * width
    expected = _HEADER + numbers_stored * dtype.itemsize
    if size != expected:
        raise ValueError(f"{source} has {size} bytes, and the sizes in its header take {expected}")
    unchecked = unchecked_files([path])
    tensors = _layout(source, dtype, padded, positions, layers, width)
    opened = GPT2Source(f"llm.c, version {version}", source, config, tensors, unchecked=unchecked)
    if vocabulary != padded:
        trim_vocabulary(opened, vocabulary)
    return opened


def _layout(
    source: str, dtype: torch.dtype, vocabulary: int, positions: int, layers: int, width: int
) -> dict[str, StoredTensor]:
    """Where each tensor lies, by transformers' names."""
    one: list[tuple[str, tuple[int, ...]]] = [
        ("wte.weight", (vocabulary, width)),
        ("wpe.weight", (positions, width)),
    ]
    each: list[tuple[str, tuple[int, ...]]] = [
        ("ln_1.weight", (width,)),
        ("ln_1.bias", (width,)),
        ("attn.c_attn.weight", (3 * width, width)),
        ("attn.c_attn.bias", (3 * width,)),
        ("attn.c_proj.weight", (width, width)),
        ("attn.c_proj.bias", (width,)),
        ("ln_2.weight", (width,)),
        ("ln_2.bias", (width,)),
        ("mlp.c_fc.weight", (4 * width, width)),
        ("mlp.c_fc.bias", (4 * width,)),
        ("mlp.c_proj.weight", (width, 4 * width)),
        ("mlp.c_proj.bias", (width,)),
    ]
    last: list[tuple[str, tuple[int, ...]]] = [("ln_f.weight", (width,)), ("ln_f.bias", (width,))]
    order = [*one]
    order += [(f"h.{layer}.{name}", shape) for name, shape in each for layer in range(layers)]
    order += last
    tensors, offset = {}, _HEADER
    for name, shape in order:
        read = partial(map_tensor, source, offset, shape, dtype)
        tensors[name] = StoredTensor(name, source, shape, dtype, read)
        offset += prod(shape) * dtype.itemsize
    return tensors
