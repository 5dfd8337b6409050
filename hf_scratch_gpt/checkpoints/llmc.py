"""Read a checkpoint of llm.c (github.com/karpathy/llm.c): a `.bin` file.

A header of 256 integers (magic number, version, sizes) and then all parameters in the order of the
struct ParameterTensors of train_gpt2.c, those of one kind for all layers together.
"""

from functools import partial
from math import prod
from pathlib import Path
from struct import unpack_from

import torch

from ..model.configuration_scratch_gpt import ScratchGPTConfig
from .assemble import shapes_of
from .names import rules_of
from .sources import GPT2Source, StoredTensor, gpt2, map_tensor, told_as_error

MAGIC = 20240326
_HEADER = 256 * 4
_MOST_LAYERS = 1 << 12
_DTYPES = {3: torch.float32, 5: torch.bfloat16}


def is_llmc(source: str) -> bool:
    """Whether the file `source` begins like a checkpoint of llm.c."""
    with Path(source).open("rb") as file:
        return int.from_bytes(file.read(4), "little") == MAGIC


def read_llmc(source: str) -> GPT2Source:
    """Open the file `source`, whose size must be that of its parameters."""
    path = Path(source)
    with path.open("rb") as file:
        header = file.read(_HEADER)
    if len(header) < _HEADER or not is_llmc(source):
        raise ValueError(f"{source} does not begin like a checkpoint of llm.c")
    version, positions, vocabulary, layers, heads, width, padded = unpack_from("<7i", header, 4)
    if version not in _DTYPES:
        raise ValueError(f"{source} has version {version}; versions 3 and 5 can be read")
    size = path.stat().st_size
    if layers > _MOST_LAYERS:  # a billion would take long to describe
        raise ValueError(f"{source} says that it has {layers} layers, over {_MOST_LAYERS}")
    if not 0 < vocabulary <= padded:
        raise ValueError(f"{source} says that {vocabulary} of {padded} rows are tokens")
    sizes = dict(n_embd=width, n_layer=layers, n_head=heads, n_positions=positions)
    with told_as_error(source):
        config = ScratchGPTConfig(**sizes, vocab_size=padded)
        # The tanh form: gelu_forward in train_gpt2.c.
        theirs = gpt2(**sizes, vocab_size=padded, activation_function="gelu_new")
    tensors, end = {}, _HEADER
    shapes, dtype = shapes_of(config, layers), _DTYPES[version]
    for rule in rules_of(layers):
        if rule.ours[0] in shapes:  # all but the head
            outputs, *inputs = shapes[rule.ours[0]]
            shape = (outputs * len(rule.ours), *inputs)
            read = partial(map_tensor, source, end, shape, dtype)
            tensors[rule.gpt2] = StoredTensor(rule.gpt2, source, shape, dtype, read)
            end += prod(shape) * dtype.itemsize
    if size != end:
        raise ValueError(f"{source} has {size} bytes, and the sizes in its header take {end}")
    opened = GPT2Source(f"llm.c, version {version}", source, config, theirs, tensors)
    if vocabulary != padded:
        opened.trim_vocabulary(vocabulary)
    return opened
