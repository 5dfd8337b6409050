"""`generate` against plain loops that use no cache."""

import copy
from typing import Any

import pytest
import torch

from .subject import PADDING, Subject, left_padded, random_ids

NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PADDING}


@pytest.fixture
def model(subject: Subject) -> Any:
    """A random model."""
    return subject.random()


@torch.no_grad()
def greedy(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """`ids` (B, T) and the likeliest next tokens, one after the other."""
    for _ in range(NEW):
        token = model(ids, use_cache=False).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, token[:, None]], dim=1)
    return ids


@torch.no_grad()
def sampled(model: Any, ids: torch.Tensor, temperature: float, top_k: int) -> torch.Tensor:
    """`ids` (B, T) and tokens drawn from the `top_k` likeliest."""
    for _ in range(NEW):
        scores = model(ids, use_cache=False).logits[:, -1].float() / temperature
        lowest = scores.topk(top_k).values[:, -1:]
        scores = scores.masked_fill(scores < lowest, -torch.inf)
        ids = torch.cat([ids, torch.multinomial(scores.softmax(-1), 1)], dim=1)
    return ids


@torch.no_grad()
def best_of_beams(model: Any, ids: torch.Tensor, beams: int) -> torch.Tensor:
    """`ids` (1, T) and the likeliest continuation that a search with `beams` finds."""
    sums = torch.zeros(1)
    for _ in range(NEW):
        logs = model(ids, use_cache=False).logits[:, -1].float().log_softmax(-1)
        sums, places = (sums[:, None] + logs).flatten().topk(beams)
        rows = places // logs.shape[1]
        ids = torch.cat([ids[rows], (places % logs.shape[1])[:, None]], dim=1)
    return ids[:1]


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_greedy_generation_of_a_padded_batch(model: Any, cache: str | None) -> None:
    """Each text of a left-padded batch goes on as it does alone, with every cache and without.

    Serves everyone. Cure: as for padding and caches; `generate` gives `attention_mask`,
    `position_ids` and `cache`, and no step may swallow one.
    """
    ids, mask = left_padded(model)
    how = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    generated = model.generate(ids, attention_mask=mask, **GREEDY, **how)
    assert generated[:1].tolist() == greedy(model, ids[:1]).tolist()
    assert generated[1:, 4:].tolist() == greedy(model, ids[1:, 4:]).tolist()


def test_sampling_under_a_seed(model: Any) -> None:
    """Sampling draws from the distribution of the logits.

    Serves everyone. Cure: as for greedy generation.
    """
    ids = random_ids(model, 2, 9)
    torch.manual_seed(1)
    expected = sampled(model, ids, temperature=0.7, top_k=20)
    torch.manual_seed(1)
    how = GREEDY | {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 1.0}
    assert model.generate(ids, attention_mask=torch.ones_like(ids), **how).tolist() == (
        expected.tolist()
    )


def test_several_sequences_of_one_prompt(model: Any) -> None:
    """`num_return_sequences` samples a prompt as if it were given several times.

    Serves sampling of many answers. Cure: nothing in `forward` may fix the number of texts.
    """
    ids = random_ids(model, 1, 9).repeat(3, 1)
    results = []
    for prompt, rows in ((ids, 1), (ids[:1], 3)):
        torch.manual_seed(1)
        how = GREEDY | {"do_sample": True, "num_return_sequences": rows}
        generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), **how)
        results.append(generated.tolist())
    assert results[0] == results[1]
    assert results[0][0] != results[0][1]


def test_beams(model: Any) -> None:
    """Beam search finds the continuation that a plain search without a cache finds.

    Serves translation and the like. Cure: keep all of the past in the `Cache`, which is what is
    reordered as beams are chosen.
    """
    ids = random_ids(model, 1, 9)
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=3, **GREEDY)
    assert generated.tolist() == best_of_beams(model, ids, beams=3).tolist()


@pytest.mark.parametrize("by", ["assistant", "prompt lookup"])
def test_assisted_generation(model: Any, by: str) -> None:
    """Guessed tokens, checked several at a time, give what greedy generation gives.

    Serves speculative decoding. Cure: keep all of the past in the `Cache`, which is shortened where
    a guess was wrong.
    """
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    how = {"assistant_model": assistant} if by == "assistant" else {"prompt_lookup_num_tokens": 3}
    ids = random_ids(model, 1, 5).repeat(1, 2)
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, **how)
    assert generated.tolist() == greedy(model, ids).tolist()


def test_a_text_goes_on_from_its_cache(model: Any) -> None:
    """`generate` goes on from the cache that it returned.

    Serves chats. Cure: return the cache in the output as `cache`.
    """
    ids = random_ids(model, 1, 9)
    how = GREEDY | {"return_dict_in_generate": True}
    first = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    longer = torch.cat([first.sequences, random_ids(model, 1, 3)], dim=1)
    again = model.generate(
        longer, attention_mask=torch.ones_like(longer), cache=first.cache, **GREEDY
    )
    assert again.tolist() == greedy(model, longer).tolist()


def test_a_prompt_as_embeddings(model: Any) -> None:
    """`generate(inputs_embeds=...)` goes on as from the ids.

    Serves soft prompts and models of several media. Cure: name `inputs_embeds` in `forward` and, if
    there is one, in `prepare_inputs_for_generation`.
    """
    ids = random_ids(model, 1, 9)
    embeds = model.get_input_embeddings()(ids)
    generated = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **GREEDY)
    assert generated.tolist() == greedy(model, ids)[:, 9:].tolist()
