"""One token at a time on a CPU, by C++: `one_token.cpp`."""

import ctypes
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from ..model.positions_scratch_gpt import raise_past_limit
from .private_ops import is_watched
from .products import INTEGER, POINTER, TYPES, Product, address_of, call, product_of, structure
from .rough_head import Rough, rough_of


def can_compute(model: Any) -> bool:
    """Whether the C++ gives what `model`, which has been optimized for generation, would give.

    Not so if a part is of a class whose mathematics the engine does not know, has a hook or is in
    training mode, or if a parameter has another shape than the configuration says, is another kind
    of tensor than torch's own, is not on a CPU, or not in float32, bfloat16 or int8.
    """
    parts, parameters = list(model.modules()), dict(model.named_parameters(remove_duplicate=False))
    dtypes = {part.weight.dtype for part in parts if isinstance(part, nn.Linear)}
    return (
        all(type(part) in model.optimized.known for part in parts)
        and not any(part.training or is_watched(part) for part in parts)
        and {name: p.shape for name, p in parameters.items()} == model.optimized.shapes
        and all(p.is_cpu and type(p) in (nn.Parameter, torch.Tensor) for p in parameters.values())
        and dtypes in ({model.dtype}, {torch.int8})
        and model.dtype in TYPES
        and model.config._attn_implementation in ("eager", "sdpa")
    )


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
    **dict.fromkeys(("heads", "room", "inner_size", "way", "type"), INTEGER),
)


def _norm(norm: Any, held: list[Any]) -> Any:
    return _Norm(address_of(norm.weight, held), address_of(norm.bias, held), norm.eps)


class OneToken:
    """Reads the tokens of one text, after its prompt, one at a time.

    Args:
        model: one that `can_compute` is true of, and that nothing changes meanwhile.
        prompt: keys and values of the tokens before.
        way: one of `WAYS` to read matrices in; see `fastest_way`.
    """

    def __init__(self, model: Any, prompt: DynamicCache, way: int = 0) -> None:
        self._model, self._length, config = model, prompt.get_seq_length(), model.config
        room = (config.num_attention_heads, config.max_position_embeddings, config.head_dim)
        rough = rough_of(model.lm_head)
        self._held: list[Any] = [rough]  # what the structures point to
        blocks = []
        for block, layer in zip(model.model.layers, prompt.layers, strict=True):
            # For all positions; pages that no token reaches take no memory.
            caches = [torch.empty(room, dtype=model.dtype, device="cpu") for _ in range(2)]
            for own, read in zip(caches, (layer.keys, layer.values), strict=True):
                own[:, : self._length] = read[0]
            self._held += caches
            blocks.append(self._block(block, *caches))
        self._structure = _Model(
            blocks=(_Block * len(blocks))(*blocks),
            layers=len(blocks),
            norm=_norm(model.model.norm, self._held),
            head=product_of(model.lm_head, self._held),
            rough_head=Rough() if rough is None else rough.as_structure(),
            heads=config.num_attention_heads,
            room=config.max_position_embeddings,
            inner_size=config.intermediate_size,
            way=way,
            type=TYPES[model.dtype],
        )
        self._most = self._structure.rough_head.most  # 0 if the rough head is of no use

    def logits_after(self, token: torch.Tensor) -> torch.Tensor:
        """Read `token` (1, 1); return the scores of the next one, (1, 1, V), in float32."""
        return self._read(token, 0)[1]

    def best_after(self, token: torch.Tensor) -> torch.Tensor:
        """Read `token` (1, 1); return the one that scores highest after it, (1, 1)."""
        word, scores = self._read(token, self._most)
        if word >= 0:
            return torch.tensor([[word]], device="cpu")
        self._most = 0  # the next ones would probably be as this one
        return scores[:, -1].argmax(-1, keepdim=True)

    def _read(self, token: torch.Tensor, most: int) -> tuple[int, torch.Tensor]:
        """The best word, or -1 and all scores (1, 1, V); `most` is that of `Rough`."""
        config, model = self._model.config, self._model.model
        if self._length >= config.max_position_embeddings:
            raise_past_limit(self._length + 1, config.max_position_embeddings)
        position = torch.tensor([[self._length]], device="cpu")
        embedded = (model.embed_tokens(token) + model.embed_positions(position)).float()
        scores = torch.empty(1, 1, self._structure.head.rows, dtype=torch.float32, device="cpu")
        self._structure.rough_head.most = most
        word = call("step", self._structure, self._length, embedded, scores)
        self._length += 1
        return word, scores

    def _block(self, block: Any, keys: torch.Tensor, values: torch.Tensor) -> Any:
        attention, mlp, held = block.self_attn, block.mlp, self._held
        projections = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        return _Block(
            _norm(block.input_layernorm, held),
            *(product_of(projection, held) for projection in projections),
            _norm(block.post_attention_layernorm, held),
            product_of(mlp.up_proj, held),
            product_of(mlp.down_proj, held),
            keys.data_ptr(),
            values.data_ptr(),
            attention.scaling,
            mlp.activation.form == "tanh",
        )
