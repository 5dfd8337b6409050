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
    token_type_ids: torch.Tensor | None,
    cache: object,
) -> None:
    """Raise a ValueError unless a model can read these.

    Args:
        config: the model's.
        vocab_size: V, of the embedding at hand, which may have been resized.
        input_ids: ids (B, T), from 0 to V - 1, or None.
        inputs_embeds: vectors (B, T, C), or None.
        token_type_ids: ids (B, T) or (1, T), from 0 to V - 1, or None.
        cache: a `Cache`, the one of continuous batching, or None.
    """
    if not (cache is None or isinstance(cache, (Cache, PagedAttentionCache))):
        raise ValueError(f"cache is a {type(cache).__name__}; give a Cache, such as DynamicCache()")
    if input_ids is not None and inputs_embeds is None:
        if input_ids.ndim != 2:
            raise ValueError(
                f"input_ids has the shape {list(input_ids.shape)}; give (B, T), one text as "
                "input_ids[None]"
            )
        _check_ids(input_ids, vocab_size)
        batch, tokens = input_ids.shape
    elif inputs_embeds is not None and input_ids is None:
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != config.hidden_size:
            shape = list(inputs_embeds.shape)
            raise ValueError(
                f"inputs_embeds has the shape {shape}; give (B, T, {config.hidden_size})"
            )
        batch, tokens = inputs_embeds.shape[:2]
    else:
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if token_type_ids is not None:
        check_rows("token_type_ids", token_type_ids, batch, tokens)
        _check_ids(token_type_ids, vocab_size)


def check_rows(name: str, given: torch.Tensor, batch: int, tokens: int) -> None:
    """Raise a ValueError unless `given`, called `name`, has the shape (B, T) or (1, T)."""
    if given.shape not in ((batch, tokens), (1, tokens)):
        raise ValueError(
            f"{name} has the shape {list(given.shape)}; give [{batch}, {tokens}] or [1, {tokens}], "
            "one for each new token"
        )


def _check_ids(ids: torch.Tensor, vocab_size: int) -> None:
    """Raise a ValueError if an id is not in the vocabulary.

    On a CPU alone: on a GPU, to look at a number is to wait for it.
    """
    if is_tracing(ids) or not ids.is_cpu or not ids.numel():
        return
    try:
        lowest, highest = (int(number) for number in ids.aminmax())
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
        inputs: vectors of the new tokens, (B, T, C).
        attention_mask: as the model's `forward` takes it. Of (B, S) columns, 1 for tokens and 0
            for padding, positions count the tokens alone.
        position_ids: (B or 1, T), the positions if they are given.
        cache: the cache, of which `past_length` tokens are filled.

    Raises:
        ValueError: a token would stand past the last position or before the first; the mask has
            fewer columns than there are tokens.
    """
    batch, tokens = inputs.shape[:2]
    padding_mask = None
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        padding_mask = attention_mask
        rows = padding_mask.shape[0]  # `len` would fix the number in an export
        if rows != batch:
            raise ValueError(
                f"attention_mask has {rows} rows for {batch} texts; give a row for each"
            )
    if position_ids is not None:
        check_rows("position_ids", position_ids, batch, tokens)
    # Before a kernel runs: on a GPU it would take the process down with it, and so would compiled
    # code on a CPU.
    check = _check_sizes if is_tracing(inputs) else _check_length
    total_length = past_length + tokens
    check(config.max_position_embeddings, total_length, cache, padding_mask, position_ids)
    if position_ids is not None:
        return position_ids
    steps = torch.arange(tokens, device=inputs.device) + past_length  # (T,)
    if padding_mask is None:
        return steps.unsqueeze(0)
    # `long` first: the older ONNX exporter cannot sum truth values.
    positions = (padding_mask.to(steps.device) != 0).long().cumsum(-1) - 1  # (B, S)
    return positions.clamp(min=0).index_select(1, steps)


def _check_length(
    limit: int,
    total_length: int | torch.Tensor,
    cache: Cache | None,
    padding_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> None:
    """Raise a ValueError if one of `total_length` tokens would stand past the last position."""
    columns = total_length if padding_mask is None else padding_mask.shape[1]
    # A cache of fixed size may come with a column for all that it has room for.
    if columns < total_length or (cache is None and columns > total_length):
        raise ValueError(
            f"attention_mask has {columns} columns for {int(total_length)} tokens; give one column "
            "for every token, cached ones included"
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


def _check_sizes(
    limit: int, total_length: Any, cache: Any, padding_mask: Any, position_ids: Any
) -> None:
    """The same in a trace, which knows neither positions nor how full a static cache is."""
    if isinstance(total_length, torch.Tensor) and cache is not None:
        capacity = cache.get_max_length()
        if capacity > limit:
            raise ValueError(
                f"{capacity} tokens, for which the static cache has room, exceed the model's "
                f"{limit} positions; lower max_cache_len, or max_new_tokens in generate"
            )
    elif position_ids is None and total_length > limit:
        raise_past_limit(total_length, limit)


def raise_past_limit(tokens: int | torch.Tensor, limit: int) -> NoReturn:
    """Raise the ValueError for `tokens` tokens where the model has `limit` positions."""
    raise ValueError(
        f"{int(tokens)} tokens exceed the model's {limit} positions; truncate the prompt or lower "
        "max_new_tokens"
    )
