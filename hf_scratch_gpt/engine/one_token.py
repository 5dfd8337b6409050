"""One token of each text at a time on a CPU, by C++: `one_token.cpp`."""

# B texts, T new tokens, S tokens for which there is room, H heads, D head size, V vocabulary

import ctypes
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicLayer

from ..model.positions_scratch_gpt import raise_past_limit
from .packing import empty_in_large_pages, panels_of
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


def can_compute_many(model: Any) -> bool:
    """Whether it does so for several texts, if it does for one: it needs all weights in panels."""
    return all(panels_of(part) for part in model.modules() if isinstance(part, nn.Linear))


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
    texts=POINTER,
    count=INTEGER,
)


def _norm(norm: Any, held: list[Any]) -> Any:
    return _Norm(address_of(norm.weight, held), address_of(norm.bias, held), norm.eps)


class Room(DynamicLayer):
    """A layer of a cache that stays where it is: in `memory` (2, B, H, S, D)."""

    def __init__(self, memory: torch.Tensor) -> None:
        super().__init__()
        self.memory, self.is_initialized = memory, True
        self.keys, self.values = memory[:, :, :, :0]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values (B, H, T, D) behind those before; return all."""
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        assert end <= self.memory.shape[3]
        self.keys, self.values = self.memory[:, :, :, :end]
        self.keys[:, :, start:], self.values[:, :, start:] = key_states, value_states
        return self.keys, self.values


def cache_with_room(model: Any, prompts: tuple[int, ...], room: int) -> Cache:
    """A cache with room for `room` tokens of each text, in whose memory the C++ writes.

    `prompts` is their shape, (B, T).
    """
    config, (batch, tokens) = model.config, prompts
    shape = config.num_hidden_layers, 2, batch, config.num_attention_heads, room, config.head_dim
    if room <= 2 * tokens:
        memory = empty_in_large_pages(*shape, dtype=model.dtype)
    else:  # in small pages, room that no token reaches takes no memory
        memory = torch.empty(shape, dtype=model.dtype, device="cpu")
    return Cache(layers=[Room(of_layer) for of_layer in memory])


class OneToken:
    """Reads the tokens of texts, after their prompts, one of each at a time.

    Args:
        model: one that `can_compute` is true of, `can_compute_many` too if there are several texts,
            and that nothing changes meanwhile.
        cache: one with room, after it has read the tokens before.
        way: one of `WAYS` to read matrices in; see `fastest_way`.
        first: (B,), where each text begins, if padding goes before some.
    """

    def __init__(
        self, model: Any, cache: Cache, way: int = 0, first: torch.Tensor | None = None
    ) -> None:
        self._model, self._length, config = model, cache.get_seq_length(), model.config
        layers: Any = cache.layers
        self._batch, _, room, _ = layers[0].memory.shape[1:]
        first = torch.zeros(self._batch, dtype=torch.long, device="cpu") if first is None else first
        self._texts = torch.stack([torch.arange(self._batch, device="cpu"), first], dim=1)
        rough = rough_of(model.lm_head) if self._batch == 1 else None
        self._held: list[Any] = [rough, cache]  # what the structures point to
        blocks = [
            self._block(block, *layer.memory)
            for block, layer in zip(model.model.layers, layers, strict=True)
        ]
        self._structure = _Model(
            blocks=(_Block * len(blocks))(*blocks),
            layers=len(blocks),
            norm=_norm(model.model.norm, self._held),
            head=self._product(model.lm_head),
            rough_head=Rough() if rough is None else Rough.from_buffer_copy(rough.structure),
            heads=config.num_attention_heads,
            room=room,
            inner_size=config.intermediate_size,
            way=way,
            type=TYPES[model.dtype],
        )
        self._most = self._structure.rough_head.most  # 0 if the rough head is of no use

    def keep(self, is_going: torch.Tensor) -> None:
        """Read no more of the texts that are not `is_going` (B,)."""
        self._texts = self._texts[is_going[self._texts[:, 0]]]

    def logits_after(self, token: torch.Tensor) -> torch.Tensor:
        """Read `token` (B, 1); return the scores of the next one, (B, 1, V), in float32.

        Those of texts that are not kept are 0.
        """
        return self._read(token, 0)[1]

    def best_after(self, token: torch.Tensor) -> torch.Tensor:
        """Read `token` (B, 1); return the one that scores highest after it, (B, 1)."""
        word, scores = self._read(token, self._most)
        if word >= 0:
            return torch.tensor([[word]], device="cpu")
        self._most = 0  # the next ones would probably be as this one
        return scores[:, -1].argmax(-1, keepdim=True)

    def _read(self, token: torch.Tensor, most: int) -> tuple[int, torch.Tensor]:
        """The best word, or -1 and all scores (B, 1, V); `most` is that of `Rough`."""
        limit, model = self._model.config.max_position_embeddings, self._model.model
        index, first = self._texts.unbind(1)
        positions = self._length - first
        if positions.max() >= limit:
            raise_past_limit(positions.max() + 1, limit)
        if self._length >= self._structure.room:  # the C++ would write behind it
            raise RuntimeError(f"there is no room for more than {self._length} tokens")
        embedded = model.embed_tokens(token[index, 0]) + model.embed_positions(positions)
        shape = self._batch, 1, self._structure.head.rows
        scores = empty_in_large_pages(*shape, dtype=torch.float32)
        if len(index) < self._batch:
            scores.zero_()
        texts, self._structure.rough_head.most = self._texts.contiguous(), most
        self._structure.texts, self._structure.count = texts.data_ptr(), len(texts)
        word = call("step", self._structure, self._length, embedded.float(), scores)
        self._length += 1
        return word, scores

    def _product(self, linear: Any) -> Any:
        """The structure of `linear`, with its panels if there are several texts."""
        product = product_of(linear, self._held)
        if self._batch > 1:
            packed: Any = panels_of(linear)
            self._held.append(packed)
            product.panels = packed.panels.data_ptr()
        return product

    def _block(self, block: Any, keys: torch.Tensor, values: torch.Tensor) -> Any:
        attention, mlp, held = block.self_attn, block.mlp, self._held
        projections = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        return _Block(
            _norm(block.input_layernorm, held),
            *(self._product(projection) for projection in projections),
            _norm(block.post_attention_layernorm, held),
            self._product(mlp.up_proj),
            self._product(mlp.down_proj),
            keys.data_ptr(),
            values.data_ptr(),
            attention.scaling,
            mlp.activation.form == "tanh",
        )
