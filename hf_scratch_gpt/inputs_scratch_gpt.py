"""Clear errors for what a model cannot read."""

# B batch, T query tokens, C hidden

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.utils import TransformersKwargs
from transformers.utils.import_utils import is_tracing

from .plain_scratch_gpt import is_transformed

# What hosts hand to every model: transformers' own arguments, those of its continuous batching and
# of its debugger, and the attention layers that vLLM brings.
_FROM_HOSTS = frozenset(
    [
        *TransformersKwargs.__annotations__,
        *PagedAttentionArgs.__annotations__,
        *("debug_io", "debug_io_dir", "prune_layers"),
        "attention_instances",
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
    packed = {
        name: value for name, value in given.pop("kwargs", {}).items() if name != "return_dict"
    }
    given |= packed
    unknown = [name for name in given if name not in _FROM_HOSTS and name not in _OF_LOSS]
    if not unknown:
        return given
    declared = _arguments(attend) - _OF_ATTENTION
    for name in unknown:
        if name not in declared:
            known = _arguments(forward) | declared | _FROM_HOSTS | _OF_LOSS | _OF_HEADS
            known |= {"past_key_values"}  # which `deprecate_kwarg` takes for `cache`
            nearest = difflib.get_close_matches(name, known - {name}, n=1, cutoff=0)[0]
            raise TypeError(
                f"forward() does not know the keyword argument {name!r}; the nearest that it knows "
                f"is {nearest!r}"
            )
    return given


def _arguments(function: Callable[..., Any]) -> set[str]:
    """Names of the arguments that `function` declares."""
    parameters = inspect.signature(function).parameters.values()
    return {each.name for each in parameters if each.kind is not each.VAR_KEYWORD}


def check_inputs(inputs: torch.Tensor, cache: object, vocab_size: int, hidden_size: int) -> None:
    """Raise a ValueError unless these can be read.

    Ids are looked at on a CPU alone: on a GPU, to look at a number is to wait for it.

    Args:
        inputs: ids (B, T), from 0 to `vocab_size` - 1, or vectors (B, T, C).
        cache: a `Cache`, the one of continuous batching, or None.
        vocab_size: how many ids there are.
        hidden_size: C.
    """
    if not (cache is None or isinstance(cache, (Cache, PagedAttentionCache))):
        raise ValueError(f"cache is a {type(cache).__name__}; give a Cache, such as DynamicCache()")
    if is_tracing(inputs) or is_transformed():
        return  # there are no values to look at
    shape = list(inputs.shape)
    if inputs.is_floating_point():
        if inputs.ndim != 3 or shape[-1] != hidden_size:
            raise ValueError(f"inputs_embeds has the shape {shape}; give (B, T, {hidden_size})")
    elif inputs.ndim != 2:
        raise ValueError(
            f"input_ids has the shape {shape}; give (B, T), one text as input_ids[None]"
        )
    elif inputs.is_cpu and inputs.numel():
        lowest, highest = (int(number) for number in inputs.aminmax())
        if lowest < 0 or highest >= vocab_size:
            raise ValueError(
                f"id {lowest if lowest < 0 else highest} is not in the vocabulary of {vocab_size} "
                "tokens; use the model's own tokenizer, or resize_token_embeddings for new tokens"
            )
