"""One token at a time on a CPU, by C++: `one_token.cpp`."""

import ctypes
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from ..model.positions_scratch_gpt import raise_past_limit
from .plain import is_changed, is_plain
from .products import DTYPES, Product, address_of, compiled, product_of
from .rough_head import Rough, rough_of

ATTENTION = "bands_or_sdpa"  # what transformers is told to call that of `fast_blocks`
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
    "fast_blocks.PackedAttention",
    "fast_blocks.PackedFeedForward",
    "fast_linear.PackedLinear",
    "fast_linear.Int8Linear",
}
_KNOWN_OF_TORCH = (nn.Linear, nn.Embedding, nn.Dropout, nn.ModuleList)


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
        and model.dtype in DTYPES
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


class _Norm(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("eps", ctypes.c_float),
    )


class _Block(ctypes.Structure):
    _fields_ = (
        ("input_layernorm", _Norm),
        ("query", Product),
        ("key", Product),
        ("value", Product),
        ("out", Product),
        ("post_attention_layernorm", _Norm),
        ("up", Product),
        ("down", Product),
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
        ("head", Product),
        ("rough_head", Rough),
        ("heads", ctypes.c_int64),
        ("room", ctypes.c_int64),
        ("inner_size", ctypes.c_int64),
        ("way", ctypes.c_int64),
    )


def _norm(norm: Any, held: list[Any]) -> _Norm:
    return _Norm(address_of(norm.weight, held), address_of(norm.bias, held), norm.eps)


def best_word(scores: torch.Tensor) -> torch.Tensor:
    """Which of `scores` (B, V) is the highest, of several the first, (B, 1); of a NaN, that."""
    # torch takes several times as long. In float64, as numpy has no bfloat16.
    return torch.from_numpy(scores.double().numpy().argmax(-1, keepdims=True))


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
        rough = rough_of(model.lm_head)
        self._held: list[Any] = [memory, rough]  # what the structures point to
        blocks = [
            self._block(block, memory.keys[layer], memory.values[layer])
            for layer, block in enumerate(model.model.layers)
        ]
        self._structure = _Model(
            blocks=(_Block * len(blocks))(*blocks),
            layers=len(blocks),
            norm=_norm(model.model.norm, self._held),
            head=product_of(model.lm_head, self._held),
            rough_head=Rough() if rough is None else rough.structure(),
            heads=model.config.num_attention_heads,
            room=model.config.max_position_embeddings,
            inner_size=model.config.intermediate_size,
            way=way,
        )
        dtype = DTYPES[model.dtype]
        weights = "int8_" if model.lm_head.weight.dtype == torch.int8 else ""
        self._step = compiled()[f"step_{weights}{dtype}"]
        self._step.restype = None
        self._best_word = compiled()[f"best_word_{dtype}"]
        self._best_word.restype = ctypes.c_int64
        self._scores = None
        if rough is not None:
            self._scores = torch.empty(len(rough.weight), dtype=torch.float32, device="cpu")

    def logits_after(self, token: torch.Tensor) -> torch.Tensor:
        """Read `token` (1, 1); return the scores of the next one, (1, 1, V), in float32."""
        logits = torch.empty(1, 1, self._structure.head.rows, dtype=torch.float32, device="cpu")
        self._read(token, self._step, logits)
        self._length += 1
        return logits

    def best_after(self, token: torch.Tensor) -> torch.Tensor:
        """Read `token` (1, 1); return the one that scores highest after it, (1, 1)."""
        if self._scores is not None:
            word = self._read(token, self._best_word, self._scores)
            if word >= 0:
                self._length += 1
                return torch.tensor([[word]], device="cpu")
            # To read the token once more does no harm. The next ones would probably be as this one.
            self._scores = None
        return best_word(self.logits_after(token)[:, -1])

    def _read(self, token: torch.Tensor, step: Any, scores: torch.Tensor) -> int:
        """Call a function of the C++, `step`, that fills `scores` (..., V)."""
        limit = self._model.config.max_position_embeddings
        if self._length >= limit:
            raise_past_limit(self._length + 1, limit)
        model = self._model.model
        position = torch.tensor([[self._length]], device="cpu")
        embedded = (model.embed_tokens(token) + model.embed_positions(position)).float()
        result: int = step(
            ctypes.byref(self._structure),
            ctypes.c_int64(self._length),
            ctypes.c_void_p(embedded.data_ptr()),
            ctypes.c_void_p(scores.data_ptr()),
            ctypes.c_int(torch.get_num_threads()),
        )
        return result

    def _block(self, block: Any, keys: torch.Tensor, values: torch.Tensor) -> _Block:
        attention, mlp = block.self_attn, block.mlp
        return _Block(
            input_layernorm=_norm(block.input_layernorm, self._held),
            query=product_of(attention.q_proj, self._held),
            key=product_of(attention.k_proj, self._held),
            value=product_of(attention.v_proj, self._held),
            out=product_of(attention.o_proj, self._held),
            post_attention_layernorm=_norm(block.post_attention_layernorm, self._held),
            up=product_of(mlp.up_proj, self._held),
            down=product_of(mlp.down_proj, self._held),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            scaling=attention.scaling,
            tanh=mlp.activation.form == "tanh",
        )
