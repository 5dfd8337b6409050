"""One token at a time on a CPU, by C++: `one_token.cpp`."""

import ctypes
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from ..model.positions_scratch_gpt import raise_past_limit
from .private_ops import is_watched
from .products import DTYPES, INTEGER, POINTER, Product, address_of, call, product_of, structure
from .rough_head import Rough, rough_of


def can_compute(model: Any, known: Collection[type]) -> bool:
    """Whether the C++ gives what `model`, a language model of ours, would give.

    Not so if a part is not of the classes `known` or has another shape than the configuration says,
    has a hook, is in training mode, not on a CPU or in another data type than float32 and bfloat16,
    or if a parameter is another kind of tensor than torch's own.
    """
    parts = list(model.modules())
    matrices = [part.weight for part in parts if isinstance(part, nn.Linear)]
    parameters = list(model.parameters())
    return (
        all(type(part) in known for part in parts)
        and not any(part.training or is_watched(part) for part in parts)
        and _has_its_shapes(model)
        and all(p.is_cpu and type(p) in (nn.Parameter, torch.Tensor) for p in parameters)
        and all(matrix.is_contiguous() for matrix in matrices)
        and {matrix.dtype for matrix in matrices} in ({model.dtype}, {torch.int8})
        and model.dtype in DTYPES
        and model.config._attn_implementation in ("eager", "sdpa")
    )


def _has_its_shapes(model: Any) -> bool:
    """Whether all parameters are of the sizes that the configuration gives."""
    config, inner, size = model.config, model.config.intermediate_size, model.config.hidden_size
    shapes, norms = [(model.lm_head, config.vocab_size, size)], [model.model.norm]
    for block in model.model.layers:
        shapes += [(layer, size, size) for layer in projections(block.self_attn)]
        shapes += [(block.mlp.up_proj, inner, size), (block.mlp.down_proj, size, inner)]
        norms += [block.input_layernorm, block.post_attention_layernorm]
    return (
        all(_is_shaped(*each) for each in shapes)
        and all(norm.weight.shape == norm.bias.shape == (size,) for norm in norms)
        and len(model.model.layers) == config.num_hidden_layers
    )


def projections(attention: Any) -> tuple[Any, ...]:
    """Its linear layers, in the order of the C++."""
    return attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj


def _is_shaped(linear: Any, rows: int, columns: int) -> bool:
    is_right = linear.weight.shape == (rows, columns)
    return is_right and (linear.bias is None or linear.bias.shape == (rows,))


# The structures of the C++, in its order.
_Norm = structure("Norm", weight=POINTER, bias=POINTER, eps=ctypes.c_float)
_Block = structure(
    "Block",
    input_layernorm=_Norm,
    **dict.fromkeys(("query", "key", "value", "out"), Product),
    post_attention_layernorm=_Norm,
    **dict.fromkeys(("up", "down"), Product),
    **dict.fromkeys(("keys", "values"), POINTER),
    scaling=ctypes.c_float,
    tanh=ctypes.c_bool,
)
_Model = structure(
    "Model",
    blocks=ctypes.POINTER(_Block),
    layers=INTEGER,
    norm=_Norm,
    head=Product,
    rough_head=Rough,
    **dict.fromkeys(("heads", "room", "inner_size", "way"), INTEGER),
)


def _norm(norm: Any, held: list[Any]) -> Any:
    return _Norm(address_of(norm.weight, held), address_of(norm.bias, held), norm.eps)


def best_word(scores: torch.Tensor) -> torch.Tensor:
    """Which of `scores` (B, V) is the highest, of several the first, (B, 1); of a NaN, that."""
    # torch takes several times as long. In float64, as numpy has no bfloat16.
    return torch.from_numpy(scores.double().numpy().argmax(-1, keepdims=True))


class OneToken:
    """Reads the tokens of one text, after its prompt, one at a time.

    Args:
        model: one that `can_compute` is true of, and that nothing changes meanwhile.
        prompt: keys and values of the tokens before.
        way: one of `WAYS` to read matrices in; see `fastest_way`.
    """

    def __init__(self, model: Any, prompt: DynamicCache, way: int = 0) -> None:
        self._length = prompt.get_seq_length()
        config = model.config
        room = (config.num_attention_heads, config.max_position_embeddings, config.head_dim)
        # Of keys and of values, for all positions; pages that no token reaches take no memory.
        self._caches = []
        for layer in prompt.layers:
            caches = [torch.empty(room, dtype=model.dtype, device="cpu") for _ in range(2)]
            for own, read in zip(caches, (layer.keys, layer.values), strict=True):
                own[:, : self._length] = read[0]
            self._caches.append(caches)

        self._model = model
        rough = rough_of(model.lm_head)
        self._held: list[Any] = [rough]  # what the structures point to
        pairs = zip(model.model.layers, self._caches, strict=True)
        blocks = [self._block(block, *caches) for block, caches in pairs]
        self._structure = _Model(
            blocks=(_Block * len(blocks))(*blocks),
            layers=len(blocks),
            norm=_norm(model.model.norm, self._held),
            head=product_of(model.lm_head, self._held),
            rough_head=Rough() if rough is None else rough.as_structure(),
            heads=model.config.num_attention_heads,
            room=model.config.max_position_embeddings,
            inner_size=model.config.intermediate_size,
            way=way,
        )
        dtype = DTYPES[model.dtype]
        weights = "int8_" if model.lm_head.weight.dtype == torch.int8 else ""
        self._step, self._best_word = f"step_{weights}{dtype}", f"best_word_{dtype}"
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

    def _read(self, token: torch.Tensor, function: str, scores: torch.Tensor) -> int:
        """Call a function of the C++ that fills `scores` (..., V)."""
        limit = self._model.config.max_position_embeddings
        if self._length >= limit:
            raise_past_limit(self._length + 1, limit)
        model = self._model.model
        position = torch.tensor([[self._length]], device="cpu")
        embedded = (model.embed_tokens(token) + model.embed_positions(position)).float()
        return call(function, self._structure, self._length, embedded, scores)

    def _block(self, block: Any, keys: torch.Tensor, values: torch.Tensor) -> Any:
        attention, mlp, held = block.self_attn, block.mlp, self._held
        return _Block(
            _norm(block.input_layernorm, held),
            *(product_of(projection, held) for projection in projections(attention)),
            _norm(block.post_attention_layernorm, held),
            product_of(mlp.up_proj, held),
            product_of(mlp.down_proj, held),
            keys.data_ptr(),
            values.data_ptr(),
            attention.scaling,
            mlp.activation.form == "tanh",
        )
