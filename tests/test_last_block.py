"""The last block computes the last token only, where nothing else is asked for."""

import copy

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers import DynamicCache, StaticCache

from hf_scratch_gpt import ScratchGPTForCausalLM, optimize_for_generation
from hf_scratch_gpt.fast_blocks import LastBlock

from .models import random_ids, random_model


@pytest.fixture
def once(monkeypatch):
    """One entry for each time that a last block computes the last token only."""
    times, attend = [], LastBlock._attend_once
    monkeypatch.setattr(
        LastBlock,
        "_attend_once",
        lambda *args, **kwargs: times.append(1) or attend(*args, **kwargs),
    )
    return times


def make(**changes):
    model = random_model(ScratchGPTForCausalLM, **changes).eval()
    return model, optimize_for_generation(copy.deepcopy(model))


def left_padded(ids):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return mask


@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_the_same_logits_and_cache(implementation, padding, once):
    model, fast = make(attn_implementation=implementation)
    ids, more = random_ids(2, 9), random_ids(2, 4)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    mask = left_padded(ids) if padding else None
    for new in (ids, more):  # a prompt, and what is added to it
        before, after = (
            each(new, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits
            for each, cache in zip((model, fast), caches, strict=True)
        )
        assert after.shape == (2, 1, model.config.vocab_size)
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
        mask = torch.cat([mask, torch.ones_like(more)], dim=1) if padding else None
    assert len(once) == 2
    for exact, own in zip(*(cache.layers for cache in caches), strict=True):
        torch.testing.assert_close(own.keys, exact.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(own.values, exact.values, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_in_bfloat16_and_int8(once):
    ids = random_ids(2, 9)
    for dtype, weights in ((torch.bfloat16, None), (torch.float32, "int8")):
        fast = optimize_for_generation(
            random_model(ScratchGPTForCausalLM).eval().to(dtype), weights
        )
        short, whole = fast(ids, logits_to_keep=1).logits[:, -1], fast(ids).logits[:, -1]
        torch.testing.assert_close(short, whole, atol=0.02, rtol=0.02)
    assert len(once) == 2


@torch.no_grad()
def test_vectors_in_place_of_ids(once):
    model, fast = make()
    vectors = torch.randn(2, 7, model.config.hidden_size)
    before, after = (each(inputs_embeds=vectors, logits_to_keep=1).logits for each in (model, fast))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert once


def test_generate_uses_it(once):
    model, fast = make()
    ids = random_ids(3, 8)
    arguments = dict(
        attention_mask=left_padded(ids), max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert fast.generate(ids, **arguments).tolist() == model.generate(ids, **arguments).tolist()
    assert len(once) == 1  # the prompt


ASKED = {
    "all logits": dict(),
    "two logits": dict(logits_to_keep=2),
    "chosen logits": dict(logits_to_keep=torch.tensor([1])),
    "hidden states": dict(logits_to_keep=1, output_hidden_states=True),
    "attentions": dict(logits_to_keep=1, output_attentions=True),
}


@pytest.mark.parametrize("name", ASKED)
@torch.no_grad()
def test_whoever_asks_for_more_gets_it(name, once):
    model, fast = make(attn_implementation="eager")
    ids = random_ids(2, 9)
    before, after = (each(ids, **ASKED[name]) for each in (model, fast))
    torch.testing.assert_close(after.logits, before.logits, atol=1e-5, rtol=1e-5)
    for field in ("hidden_states", "attentions"):
        for exact, own in zip(before.get(field) or (), after.get(field) or (), strict=True):
            torch.testing.assert_close(own, exact, atol=1e-5, rtol=1e-5)
    assert not once


@torch.no_grad()
def test_a_cache_of_another_kind(once):
    model, fast = make()
    ids = random_ids(2, 9)
    before, after = (
        each(
            ids,
            past_key_values=StaticCache(config=each.config, max_cache_len=16),
            logits_to_keep=1,
        ).logits
        for each in (model, fast)
    )
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert not once


def watch_attention(model, seen):
    hook = model.model.layers[-1].self_attn.register_forward_hook
    return hook(lambda module, args, output: seen.append(output[0].shape[1]))


def watch_norm(model, seen):
    return model.model.norm.register_forward_hook(
        lambda module, args, output: seen.append(output.shape[1])
    )


def watch_all(model, seen):
    def look(module, args, output):
        if module is model.model.layers[-1].mlp:
            seen.append(output.shape[1])

    return register_module_forward_hook(look)


@pytest.mark.parametrize("watch", [watch_attention, watch_norm, watch_all])
@torch.no_grad()
def test_whoever_watches_sees_all_tokens(watch, once):
    model, fast = make()
    ids, seen = random_ids(1, 9), []
    handle = watch(fast, seen)
    try:
        after = fast(ids, logits_to_keep=1).logits
    finally:
        handle.remove()
    torch.testing.assert_close(after, model(ids, logits_to_keep=1).logits, atol=1e-5, rtol=1e-5)
    assert seen == [9]
    assert not once


def test_gradients_reach_all_tokens(once):
    _, fast = make()
    vectors = torch.randn(1, 6, fast.config.hidden_size, requires_grad=True)
    fast(inputs_embeds=vectors, logits_to_keep=1).logits.sum().backward()
    assert (vectors.grad.abs().sum(-1) > 0).all()
    assert not once
