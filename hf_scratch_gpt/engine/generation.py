"""Make `generate` as fast as the memory allows: `optimize_for_generation(model)`.

What is special to a device or a number format is here, so that the model's own code stays plain.
"""

import weakref
from typing import Any

import torch
from torch import nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from .blocks import PackedAttention, PackedFeedForward, projections
from .half import HAS_MATRIX_UNIT, is_slow
from .large_pages import move_to_large_pages
from .one_token import ATTENTION, Memory, OneToken, best_word, can_compute, name_of
from .packed import Int8Linear, PackedLinear
from .plain import is_changed, is_plain
from .products import compiled, fastest_way
from .rough_head import keep_rough

_BLOCK = "blocks_scratch_gpt.TransformerBlock"
_ATTENTION = "blocks_scratch_gpt.MultiHeadAttention"
# Formats of weights, and what torchao calls them.
FORMATS = {
    "int8": "Int8WeightOnlyConfig",
    "int4": "Int4WeightOnlyConfig",
    "fp8": "Float8WeightOnlyConfig",
}


def optimize_for_generation(model: PreTrainedModel, weights: str | None = None) -> PreTrainedModel:
    """Change `model`, a language model of ours, so that its `generate` runs at its fastest.

    On a CPU, one text at a time is written by a step in C++, compiled here and now in two or three
    seconds; prompts, several texts at once and whatever else `generate` can do use weights packed
    for oneDNN, which take as much memory again. Greedy search in float32 and bfloat16 looks for the
    best token in a copy of the head in eight bits, and reads the head itself only where that leaves
    doubt; not so a head with a bias. On a GPU, transformers compiles its step into CUDA graphs at
    the first call, for each number of texts anew.

    The outputs are those of before, up to the order in which sums are rounded. Change weights, add
    adapters, choose data type and device before, not afterwards, and pickle nothing; a weight
    that is replaced or changed all the same is used unpacked, of query, key and value all three,
    but a change of a few of its numbers by way of its `data` goes unseen. A text goes the ordinary
    way if the C++ would not give the same: with hooks, adapters, a function between the
    feed-forward's layers that is no GELU, padding, or in float16.

    Args:
        model: in evaluation mode, on its device and in its data type.
        weights: a format to keep the weights of linear layers in. "int8" takes a byte a number and
            one scale for each row; "int4" and "fp8" are for GPUs, where all are torchao's.

    Returns:
        `model`.

    Raises:
        ValueError: `weights` is no format, or not one for the device; the model is in training
            mode, cannot generate, or has been through this before.
        ImportError: torchao is missing.
        FileNotFoundError: a C++ compiler is missing.
        RuntimeError: the compiler fails.
    """
    if not isinstance(model, GenerationMixin):
        if hasattr(model, "get_base_model"):  # PEFT's
            raise ValueError(
                f"{type(model).__name__} holds the model apart; give model.merge_and_unload(), or "
                "model.get_base_model()"
            )
        raise ValueError(f"{type(model).__name__} cannot generate; give a language model")
    if isinstance(model, _FastGeneration):
        raise ValueError("the model is optimized already; load it again to change the weights")
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    if weights is not None and weights not in FORMATS:
        raise ValueError(f"weights={weights!r} is no format; give one of {', '.join(FORMATS)}")
    if model.device.type == "meta":
        raise ValueError("the model is on the device meta, without numbers; load its weights first")
    if model.device.type == "cpu":
        if weights not in (None, "int8"):
            raise ValueError(f"weights={weights!r} needs a GPU; give 'int8' on a CPU")
        compiled()
        _replace_blocks(model, weights)
    else:
        if weights is not None:
            _quantize(model, weights)
        # transformers compiles steps over such a cache by itself
        model.generation_config.cache_implementation = "static"
        model.generation_config.max_cache_len = model.config.max_position_embeddings
    kind = type(model)
    members: dict[str, Any] = {"__module__": kind.__module__, "weight_format": weights}
    layers = [part for part in model.modules() if isinstance(part, nn.Linear)]
    members["way"] = fastest_way(layers) if can_compute(model) else 0
    # The same name, since it is saved with a model.
    model.__class__ = type(kind.__name__, (_FastGeneration, kind), members)
    return model


def _replace_blocks(model: PreTrainedModel, weights: str | None) -> None:
    """Give the linear layers in `model` int8 weights, or else packed ones, and what goes along."""
    layers, packable = [], []
    if torch.backends.mkldnn.is_available():
        packable.append(torch.float32)
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            packable.append(torch.bfloat16)
    # Ours alone, by name: an adapter's layers, or whatever else there is, stay as they are.
    for module in model.modules():
        kind = name_of(type(module))
        if "forward" in vars(module):
            continue
        if kind == "linear_scratch_gpt.Linear" and is_plain(module.weight):
            if weights == "int8":
                Int8Linear.take_over(module)
            layers.append(module)
        elif (
            kind == "blocks_scratch_gpt.FeedForward"
            and name_of(type(module.activation)) == "blocks_scratch_gpt.GELU"
        ):
            PackedFeedForward.take_over(module)
    move_to_large_pages(layer.weight for layer in layers)
    apart = {layer for layer in layers if layer.weight.dtype in packable}
    for block in model.model.layers:
        if name_of(type(block)) == _BLOCK and _can_pack(block.self_attn, apart):
            PackedAttention.take_over(block.self_attn)
            apart -= set(projections(block.self_attn))
    for layer in apart:
        PackedLinear.take_over(layer)
    if model.lm_head in layers and (rough := keep_rough(model.lm_head)):
        move_to_large_pages([rough.weight])
    # torch's attention is ahead where the CPU has a matrix unit, or else no instructions at all.
    has_bands = model.dtype == torch.bfloat16 and not (is_slow(model.dtype) or HAS_MATRIX_UNIT)
    if model.config._attn_implementation == "sdpa" and has_bands:
        model.set_attn_implementation(ATTENTION)


def _can_pack(attention: nn.Module, candidates: set[nn.Module]) -> bool:
    """Whether query, key and value of `attention`, all among `candidates`, may be one product."""
    if name_of(type(attention)) != _ATTENTION or is_changed(attention):
        return False
    layers = projections(attention)
    if not candidates.issuperset(layers):
        return False
    return len({(layer.weight.dtype, layer.bias is None) for layer in layers}) == 1


def _quantize(model: PreTrainedModel, weights: str) -> None:
    """Keep the weights of linear layers in torchao's format `weights`."""
    try:
        from torchao import quantization
    except ImportError:
        raise ImportError(
            f"weights={weights!r} needs torchao on a GPU; pip install torchao"
        ) from None
    quantization.quantize_(model, getattr(quantization, FORMATS[weights])())


# Of each model, memory that no text is using. It is kept because fresh memory is slow.
_memories: weakref.WeakKeyDictionary[nn.Module, list[Memory]] = weakref.WeakKeyDictionary()


def _borrow_memory(model: Any) -> Memory:
    """Memory that no text is using; whoever is done puts it back into `_memories`."""
    try:
        memory = _memories.setdefault(model, []).pop()
    except IndexError:
        return Memory(model.config, model.dtype)
    # The model may have been converted or resized since.
    fits = memory.fits(model.config, model.dtype)
    return memory if fits else Memory(model.config, model.dtype)


class _FastGeneration(GenerationMixin):
    """Goes before a language model's own class."""

    weight_format: str | None
    way: int  # see `fastest_way`

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """The loop of greedy search and sampling; `generate` has prepared the arguments."""
        cache: Any = model_kwargs.get("cache")
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        in_order = torch.arange(input_ids.shape[1], device="cpu")[None]
        is_ordinary = (
            input_ids.is_cpu
            and len(input_ids) == 1
            and type(cache) is DynamicCache
            and cache.get_seq_length() == 0
            and not getattr(cache, "_is_user_defined", False)
            and not torch.is_autocast_enabled("cpu")
            and (mask is None or bool(mask.all()))
            and not (synced_gpus or generation_config.return_dict_in_generate)
            and "inputs_embeds" not in model_kwargs
            and (positions is None or torch.equal(positions, in_order))
            and can_compute(self)
        )
        if not is_ordinary:
            return super()._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus,
                streamer,
                **model_kwargs,
            )
        logits = self(input_ids, cache=cache, logits_to_keep=1).logits
        memory = _borrow_memory(self)
        one_token = OneToken(self, memory, cache, self.way)

        def choose(logits: torch.Tensor) -> torch.Tensor:
            scores = logits_processor(input_ids, logits[:, -1].float())
            if generation_config.do_sample:
                return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)
            return best_word(scores)

        wants_best = not (generation_config.do_sample or logits_processor)
        token = choose(logits)
        while True:
            input_ids = torch.cat([input_ids, token], dim=-1)
            if streamer is not None:
                streamer.put(token[0])
            if stopping_criteria(input_ids, None).all():
                break
            if wants_best:
                token = one_token.best_after(token)
            else:
                token = choose(one_token.logits_after(token))
        _memories[self].append(memory)
        if streamer is not None:
            streamer.end()
        return input_ids

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As before; it knows torch's attention, not ours."""
        if self.config._attn_implementation == ATTENTION:
            self.set_attn_implementation("sdpa")
        return super().init_continuous_batching(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save as before; weights in another format cannot be saved."""
        if self.weight_format is not None:
            raise ValueError(
                f"the weights are in {self.weight_format}; save the model before it is optimized"
            )
        super().save_pretrained(*args, **kwargs)
