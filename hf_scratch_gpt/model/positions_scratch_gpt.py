"""Which position each token has, and clear errors for what a model cannot read."""

# B batch, T query tokens, S key tokens, C hidden, V vocabulary

import difflib
import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from transformers import Cache, PretrainedConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.utils import TransformersKwargs
from transformers.utils.import_utils import is_tracing

# What hosts hand to every model: transformers' own arguments, those of its continuous batching and
# of its debugger, the tokenizer that `generate` was given, the attention layers that vLLM brings.
_FROM_HOSTS = frozenset(
    [
        *TransformersKwargs.__annotations__,
        *PagedAttentionArgs.__annotations__,
        *("debug_io", "debug_io_dir", "prune_layers"),
        *("tokenizer", "attention_instances"),
    ]
)
_OF_LOSS = frozenset(["num_items_in_batch", "ignore_index", "shift_labels"])
_OF_HEADS = frozenset(["labels", "logits_to_keep", "start_positions", "end_positions"])
# What the attention block passes by itself.
_OF_ATTENTION = frozenset(
    ["module", "query", "key", "value", "attention_mask", "scaling", "dropout"]
)


def known_keywords(
    given: dict[str, Any], forward: Callable[..., Any], attend: Callable[..., Any]
) -> dict[str, Any]:
    """`given`, what `forward` took as `**kwargs`, if somebody reads each of them.

    Args:
        given: keyword arguments. Pipeline parallelism hands them on as one, named `kwargs`.
        forward: a model's; its own arguments are offered in the error.
        attend: the attention function, which may declare arguments of its own.

    Raises:
        TypeError: nobody reads one of them; names it and the nearest that is read.
    """
    # `return_dict` is for decorators, which do not see it there.
    packed = {key: value for key, value in given.pop("kwargs", {}).items() if key != "return_dict"}
    given |= packed
    unknown = [name for name in given if name not in _FROM_HOSTS and name not in _OF_LOSS]
    if not unknown:
        return given
    declared = _arguments(attend) - _OF_ATTENTION
    for name in unknown:
        if name not in declared:
            message = f"forward() does not know the keyword argument {name!r}"
            if not torch.compiler.is_compiling():  # it would trace the search, for a minute
                known = _arguments(forward) | declared | _FROM_HOSTS | _OF_LOSS | _OF_HEADS
                known |= {"past_key_values"}  # which `deprecate_kwarg` takes for `cache`
                nearest = difflib.get_close_matches(name, known - {name}, n=1, cutoff=0)[0]
                message += f"; the nearest that it knows is {nearest!r}"
            raise TypeError(message)
    return given


def _arguments(function: Callable[..., Any]) -> set[str]:
    """Names of the arguments that `function` declares."""
    parameters = inspect.signature(function).parameters.values()
    return {each.name for each in parameters if each.kind is not each.VAR_KEYWORD}


def check_inputs(
    config: PretrainedConfig,
    vocab_size: int,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    cache: object,
) -> None:
    """Raise a ValueError unless a model can read these.

    The values of ids are checked on a CPU alone: on a GPU, to look at a number is to wait for it.

    Args:
        config: the model's.
        vocab_size: V, of the embedding at hand, which may have been resized.
        input_ids: ids (B, T), from 0 to V - 1, or None.
        inputs_embeds: vectors (B, T, C), or None.
        cache: a `Cache`, the one of continuous batching, or None.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if not (cache is None or isinstance(cache, (Cache, PagedAttentionCache))):
        raise ValueError(f"cache is a {type(cache).__name__}; give a Cache, such as DynamicCache()")
    if inputs_embeds is not None:
        shape = list(inputs_embeds.shape)
        if len(shape) != 3 or shape[-1] != config.hidden_size:
            raise ValueError(
                f"inputs_embeds has the shape {shape}; give (B, T, {config.hidden_size})"
            )
        return
    assert input_ids is not None, "one of the two is given"
    if input_ids.ndim != 2:
        raise ValueError(
            f"input_ids has the shape {list(input_ids.shape)}; give (B, T), one text as "
            "input_ids[None]"
        )
    if is_tracing(input_ids) or not input_ids.is_cpu or not input_ids.numel():
        return
    try:
        lowest, highest = (int(number) for number in input_ids.aminmax())
    except RuntimeError:  # within torch.func.vmap no single value can be looked at
        return
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"id {lowest if lowest < 0 else highest} is not in the vocabulary of {vocab_size} "
            "tokens; use the model's own tokenizer, or resize_token_embeddings for new tokens"
        )


def positions_of(
    config: PretrainedConfig,
    inputs: torch.Tensor,
    attention_mask: Any,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    past_length: int | torch.Tensor,
) -> torch.Tensor:
    """The position of each new token, (B or 1, T), checked against the model's limit.

    Args:
        config: the model's; it knows `max_position_embeddings` positions.
        inputs: ids or vectors of the new tokens, (B, T) or (B, T, C).
        attention_mask: as the model's `forward` takes it. Of (B, S) columns, 1 for tokens and 0
            for padding, positions count the tokens alone.
        position_ids: (B or 1, T), the positions if they are given.
        cache: the cache, of which `past_length` tokens are filled.

    Raises:
        ValueError: a token would stand past the last position or before the first; the mask has
            fewer columns than there are tokens.
    """
    batch, tokens = inputs.shape[:2]
    is_padding_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
    if is_padding_mask and attention_mask.shape[0] != batch:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[0]} rows for {batch} texts; give a row for "
            "each"
        )
    if position_ids is not None and position_ids.shape not in ((batch, tokens), (1, tokens)):
        raise ValueError(
            f"position_ids has the shape {list(position_ids.shape)}; give [{batch}, {tokens}] or "
            f"[1, {tokens}], a position for each new token"
        )
    padding_mask = attention_mask if is_padding_mask else None
    limit = config.max_position_embeddings
    check_length(limit, inputs, cache, past_length, padding_mask, position_ids)
    if position_ids is not None:
        return position_ids
    steps = torch.arange(inputs.shape[1], device=inputs.device) + past_length  # (T,)
    if padding_mask is None:
        return steps.unsqueeze(0)
    # `long` first: the older ONNX exporter cannot sum truth values.
    positions = (padding_mask.to(steps.device) != 0).long().cumsum(-1) - 1  # (B, S)
    return positions.clamp(min=0).index_select(1, steps)


def check_length(
    limit: int,
    inputs: torch.Tensor,
    cache: Cache | None,
    past_length: int | torch.Tensor,
    padding_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> None:
    """Raise a ValueError if a token would stand past the last position.

    It has to be raised before a kernel runs: on a GPU the kernel would take the process down with
    it, and so would compiled code on a CPU.

    Args:
        limit: number of positions the model knows.
        inputs: ids or vectors of the new tokens, (B, T) or (B, T, C).
        cache: the cache, of which `past_length` tokens are filled.
        padding_mask: (B, S), or None.
        position_ids: (B or 1, T), the positions if they are given.
    """
    total_length = past_length + inputs.shape[1]
    if is_tracing(inputs):
        # A trace knows sizes, but no values: neither positions nor how full a static cache is.
        if isinstance(past_length, torch.Tensor) and cache is not None:
            capacity = cache.get_max_length()
            if capacity > limit:
                raise ValueError(
                    f"{capacity} tokens, for which the static cache has room, exceed the model's "
                    f"{limit} positions; lower max_cache_len, or max_new_tokens in generate"
                )
        elif position_ids is None and total_length > limit:
            raise_past_limit(total_length, limit)
        return
    if padding_mask is not None and total_length > padding_mask.shape[1]:
        raise ValueError(
            f"attention_mask has {padding_mask.shape[1]} columns for {int(total_length)} tokens; "
            "give one column for every token, cached ones included"
        )
    if position_ids is not None and position_ids.numel():
        lowest, highest = position_ids.aminmax()
        if lowest < 0:
            raise ValueError(f"position {int(lowest)} is below 0; give padding the position 0")
        total_length = highest + 1
    elif padding_mask is not None and total_length > limit:
        total_length = (padding_mask != 0).sum(-1).max()
    if total_length > limit:
        raise_past_limit(total_length, limit)


def raise_past_limit(tokens: int | torch.Tensor, limit: int) -> NoReturn:
    """Raise the ValueError for `tokens` tokens where the model has `limit` positions."""
    raise ValueError(
        f"{int(tokens)} tokens exceed the model's {limit} positions; truncate the prompt or lower "
        "max_new_tokens"
    )
