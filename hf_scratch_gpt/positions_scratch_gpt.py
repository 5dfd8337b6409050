"""Which position each token has, and the error for a position that the model does not know."""

# B batch, T query tokens, S key tokens

from typing import NoReturn

import torch
from transformers import Cache
from transformers.utils.import_utils import is_tracing


def positions_at(steps: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
    """Positions of the tokens at columns `steps` (T,), with padding not counted; (B or 1, T).

    Args:
        steps: columns of the new tokens, after the cached ones.
        padding_mask: (B, S), 1 for tokens and 0 for padding, or None if there is no padding.
    """
    if padding_mask is None:
        return steps.unsqueeze(0)
    positions = (padding_mask.to(steps.device) != 0).cumsum(-1) - 1  # (B, S)
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
