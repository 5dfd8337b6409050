"""Clear errors for what a model cannot read."""

# B batch, T query tokens, C hidden

import torch
from transformers import Cache
from transformers.utils.import_utils import is_tracing

from .plain_scratch_gpt import is_transformed


def check_inputs(
    inputs: torch.Tensor, past_key_values: object, vocab_size: int, hidden_size: int
) -> None:
    """Raise a ValueError unless these can be read.

    Ids are looked at on a CPU alone: on a GPU, to look at a number is to wait for it.

    Args:
        inputs: ids (B, T), from 0 to `vocab_size` - 1, or vectors (B, T, C).
        past_key_values: a `Cache` or None.
        vocab_size: how many ids there are.
        hidden_size: C.
    """
    if not (past_key_values is None or isinstance(past_key_values, Cache)):
        raise ValueError(
            f"past_key_values is a {type(past_key_values).__name__}; give a Cache, such as "
            "DynamicCache()"
        )
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
