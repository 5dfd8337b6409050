"""What a text's logits must not depend on: its neighbours, padding, the kind of cache."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from .subject import PADDING, Subject, close, left_padded, random_ids

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["eager", "sdpa"])
STEPS = [(0, 9), (9, 10), (10, 12)]


@IMPLEMENTATIONS
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(subject: Subject, side: str, implementation: str) -> None:
    """Each text of a padded batch has the logits that it has alone; nothing is NaN.

    Serves batches everywhere, and `generate`, which pads left. Cure: without `position_ids`, count
    positions on the mask, `(mask.long().cumsum(-1) - 1).clamp(min=0)`; fill masks with
    `torch.finfo(dtype).min`, as a row in which all is -inf becomes NaN.
    """
    model = subject.random()
    model.set_attn_implementation(implementation)
    texts = [random_ids(model, length) for length in (9, 5)]
    ids, mask = torch.full((2, 9), PADDING), torch.zeros(2, 9, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(9 - len(text), 9) if side == "left" else slice(len(text))
        ids[row, place], mask[row, place] = text, 1
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    for row, text in enumerate(texts):
        close(logits[row, mask[row].bool()], model(text[None]).logits[0])


@torch.no_grad()
def test_attention_implementations_agree(subject: Subject) -> None:
    """Attention written out and torch's kernel give the same logits.

    Serves whoever chooses `attn_implementation`. Cure: pass the scaling and the mask to the
    attention function, and let the module say `is_causal`.
    """
    model = subject.random()
    ids, mask = left_padded(model)
    logits = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        logits.append(model(ids, attention_mask=mask).logits[mask.bool()])
        logits.append(model(ids).logits[mask.bool()])
    close(logits[2], logits[0])
    close(logits[3], logits[1])


@IMPLEMENTATIONS
@torch.no_grad()
def test_packed_texts_equal_single_texts(subject: Subject, implementation: str) -> None:
    """Texts in one row, told apart by `position_ids` that begin anew, do not see each other.

    Serves training without padding. Cure: hand `position_ids` to `create_causal_mask`.
    """
    model = subject.random()
    model.set_attn_implementation(implementation)
    texts = [random_ids(model, 1, length) for length in (5, 7)]
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = model(torch.cat(texts, dim=1), position_ids=positions, use_cache=False).logits
    close(packed, torch.cat([model(text).logits for text in texts], dim=1))


def cache_of(kind: str, model: Any) -> Any:
    """A cache with room for sixteen tokens or more."""
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=16)
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    if not torch.accelerator.is_available():
        pytest.skip("an offloaded cache needs an accelerator to offload from")
    model.to(torch.accelerator.current_accelerator())
    return DynamicCache(config=model.config, offloading=True)


@pytest.mark.parametrize("padding", ["no", "left"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "offloaded"])
@torch.no_grad()
def test_steps_with_a_cache_equal_one_pass(subject: Subject, kind: str, padding: str) -> None:
    """A prompt, one token and two tokens give the logits of all at once.

    Serves generation, assisted generation and chats. Cure: take a `Cache` as the argument `cache`,
    ask it for the number of earlier tokens, give it keys and values by `update` with the layer's
    index, and let positions and masks go on from there.
    """
    model = subject.random()
    ids, mask = left_padded(model)
    if padding == "no":
        ids, mask = random_ids(model, 2, 12), torch.ones_like(mask)
    cache = cache_of(kind, model)
    ids, mask = ids.to(model.device), mask.to(model.device)
    # Rotary models tell positions apart by differences, others need them.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    pieces = []
    for start, end in STEPS:
        step = dict(attention_mask=mask[:, :end], position_ids=positions[:, start:end])
        pieces.append(model(ids[:, start:end], cache=cache, **step).logits)
    assert cache.get_seq_length() == 12
    close(torch.cat(pieces, dim=1)[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_padded_steps_need_no_positions(subject: Subject) -> None:
    """The same of a left-padded batch without `position_ids`, in steps.

    Serves loops that are not `generate`. Cure: count positions on the whole mask, and take those of
    the new tokens.
    """
    model = subject.random()
    ids, mask = left_padded(model)
    cache = DynamicCache(config=model.config)
    pieces = [
        model(ids[:, start:end], attention_mask=mask[:, :end], cache=cache).logits
        for start, end in STEPS
    ]
    close(torch.cat(pieces, dim=1)[1, 4:], model(ids[1:, 4:]).logits[0])


@torch.no_grad()
def test_the_cache_is_returned_if_asked_for(subject: Subject) -> None:
    """`use_cache=True` returns a cache of all layers as `cache`, and `use_cache=False` none.

    Serves loops that are not `generate`. Cure: make a `DynamicCache` where none was given, and
    return it.
    """
    model = subject.random()
    ids = random_ids(model, 1, 12)
    cache = model(ids[:, :8], use_cache=True).cache
    assert len(cache) == model.config.num_hidden_layers
    close(model(ids[:, 8:], cache=cache).logits, model(ids).logits[:, 8:])
    assert model(ids, use_cache=False).cache is None


@torch.no_grad()
def test_the_cache_is_the_fourth_argument(subject: Subject) -> None:
    """By place, `forward` takes input_ids, attention_mask, position_ids, cache.

    Serves exporters and wrappers, which pass arguments by place. Cure: this order.
    """
    model = subject.random()
    ids, cache = random_ids(model, 1, 12), DynamicCache(config=model.config)
    first = model(ids[:, :8], None, None, cache).logits
    logits = torch.cat([first, model(ids[:, 8:], None, None, cache).logits], dim=1)
    close(logits, model(ids).logits)


@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
@torch.no_grad()
def test_the_old_name_of_the_cache_is_not_swallowed(subject: Subject) -> None:
    """`past_key_values`, the name of `cache` before transformers 5.24, is used or refused.

    Serves code written before. Cure: `@deprecate_kwarg("past_key_values", "5.40.0",
    new_name="cache")` on `forward`.
    """
    model = subject.random()
    ids, cache = random_ids(model, 1, 12), DynamicCache(config=model.config)
    model(ids[:, :8], cache=cache)
    try:
        logits = model(ids[:, 8:], past_key_values=cache).logits
    except (TypeError, ValueError):
        return
    close(logits, model(ids).logits[:, 8:])


def test_past_the_last_position_the_error_is_clear(subject: Subject) -> None:
    """A text longer than a table of learned positions raises a ValueError that names the limit.

    Serves everyone: on a GPU, looking past the table ends the process with it. Cure: compare before
    the lookup, in `forward` and, for compiled steps, in `prepare_inputs_for_generation`.
    """
    model = subject.random()
    limit = model.config.max_position_embeddings
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    if not any(limit <= table.num_embeddings <= limit + 2 for table in tables):
        pytest.skip("positions are not a table that is learned")
    assert model(random_ids(model, 1, limit)).logits.isfinite().all()
    with pytest.raises(ValueError, match=str(limit)):
        model(random_ids(model, 1, limit + 3))
    with pytest.raises(ValueError, match=str(limit)):
        model.generate(random_ids(model, 1, limit - 1), max_new_tokens=5, pad_token_id=PADDING)
