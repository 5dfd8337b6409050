"""The word that scores highest, found in a rough copy of the head, is that of all scores."""

import copy

import pytest
import torch

from hf_scratch_gpt import ScratchGPTForCausalLM, optimize_for_generation
from hf_scratch_gpt.engine.one_token import OneToken, cache_with_room
from hf_scratch_gpt.engine.products import WAYS
from hf_scratch_gpt.engine.rough_head import RoughHead, rough_of

from ..models import random_ids, random_model

DTYPES = (torch.float32, torch.bfloat16)


def nothing(weight):
    pass


@torch.no_grad()
def make(change=nothing, dtype=torch.float32, **changes):
    """An optimized model, whose head was changed before."""
    model = random_model(ScratchGPTForCausalLM, tie_word_embeddings=False, **changes).eval()
    change(model.lm_head.weight)
    return optimize_for_generation(model.to(dtype))


@torch.no_grad()
def after_a_prompt(model, way=0):
    cache, ids = cache_with_room(model, (1, 5), 32), torch.arange(5)[None]
    model(ids, cache=cache)
    return OneToken(model, cache, way)


@torch.no_grad()
def both(model, tokens, way=0, is_used=None):
    """The best after each of `tokens`, and the best of all scores after each.

    If given, `is_used` tells whether the rough head is to have been of use for all of them.
    """
    one, other = after_a_prompt(model, way), after_a_prompt(model, way)
    quick = [one.best_after(token[None, None])[0] for token in tokens]
    whole = [other.logits_after(token[None, None])[:, -1].argmax(-1) for token in tokens]
    assert is_used in (None, one._most > 0)
    return torch.cat(quick).tolist(), torch.cat(whole).tolist()


def nearly_equal(weight):
    weight[:] = weight[0] * (1 + 1e-6 * torch.randn(len(weight), 1))


def equal(weight):
    weight[:] = weight[0]


def in_pairs(weight):
    weight[1::2] = weight[: len(weight) - 1 : 2]


def in_fives(weight):
    weight[:95] = weight[:19].repeat(5, 1)


def with_a_mean(weight):
    weight += 50 * torch.randn(weight.shape[1])


def tiny(weight):
    weight *= 1e-30


def large(weight):
    weight *= 1e15


def of_unlike_rows(weight):
    weight *= torch.logspace(-10, 10, len(weight))[:, None]


WITHOUT_USE = (nearly_equal, equal, tiny, torch.zero_)
OF_USE = (nothing, in_pairs, in_fives, with_a_mean, large, of_unlike_rows, torch.abs_)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", WITHOUT_USE + OF_USE, ids=lambda change: change.__name__)
def test_it_is_that_of_all_scores(change, dtype):
    model = make(change, dtype)
    assert rough_of(model.lm_head) is not None
    for way, threads, count in zip(WAYS, (1, 2, 1, 1), (10, 3, 10, 10), strict=True):
        torch.set_num_threads(threads)
        quick, whole = both(model, random_ids(count), way, is_used=change in OF_USE)
        assert quick == whole


def test_of_equal_rows_the_first():
    assert set(both(make(equal), random_ids(10))[0]) == {0}
    quick, _ = both(make(in_fives), random_ids(10), is_used=True)
    assert max(quick) < 19


@pytest.mark.parametrize("number", [torch.inf, torch.nan, 3e38])
@torch.no_grad()
def test_numbers_beyond_measure(number):
    model, tokens = make(), random_ids(4)
    model.model.norm.bias[3] = number
    quick, whole = both(model, tokens)
    assert quick == whole
    in_the_head = make(lambda weight: weight[5, 3:4].fill_(number))
    assert (rough_of(in_the_head.lm_head) is None) == (number != 3e38)
    quick, whole = both(in_the_head, tokens)
    assert quick == whole


@pytest.mark.parametrize("size", [1e-4, 1e-25])
@pytest.mark.parametrize("of_head", [1, 1e-20])
@torch.no_grad()
def test_vectors_that_are_nearly_nothing(size, of_head):
    model = make(lambda weight: weight.uniform_(0, of_head))
    for part in model.model.norm.parameters():
        part.mul_(size)
    quick, whole = both(model, random_ids(20))
    assert quick == whole


@torch.no_grad()
def test_a_sum_that_overflows_on_its_way():
    """In float32; that of the rough numbers does not."""
    model = make()
    head, norm = model.lm_head, model.model.norm
    norm.weight.zero_()
    norm.bias.fill_(1.1e19)
    head.weight.zero_()
    head.weight[3, :2] = torch.tensor([3.3e19, -3.3e19])
    head.weight[9, 0] = 1e19
    quick, whole = both(model, random_ids(1))
    assert quick == whole
    head.rough = RoughHead.of(head.weight)
    assert rough_of(head) is not None
    quick, whole = both(model, random_ids(1))
    assert quick == whole


@torch.no_grad()
def test_changed_weights_are_seen():
    model, tokens = make(), random_ids(6)
    before, whole = both(model, tokens)
    assert before == whole
    copied = copy.deepcopy(model)
    model.lm_head.weight.neg_()
    assert rough_of(model.lm_head) is None
    quick, whole = both(model, tokens)
    assert quick == whole
    assert quick != before
    assert both(copied, tokens)[0] == before


def as_rows(model, *rows):
    """Make `rows` (C,) those of the head that are 5 and 60, and their mean nothing."""
    weight = model.lm_head.weight
    weight.zero_()
    for place, row in zip((5, 60), rows, strict=True):
        weight[place], weight[place + 1] = row, -row
    model.lm_head.rough = RoughHead.of(weight)
    return rough_of(model.lm_head)


@torch.no_grad()
def test_rows_rounded_as_far_as_can_be():
    """Of two rows one is rounded down, the other up; the lower one is best."""
    model, count = make(), 31
    model.model.norm.weight.zero_()
    model.model.norm.bias.fill_(1)
    down, up = torch.full((2, count + 1), 127.0)
    down[1:], up[1:] = 3.499, 3.501
    up[-1] -= count * 0.002 * 1.05
    rough = as_rows(model, down, up).weight.sum(1)
    assert rough[60] > rough[5]
    assert down.sum() > up.sum()
    assert both(model, random_ids(2), is_used=True) == ([5, 5], [5, 5])


@torch.no_grad()
def test_a_vector_rounded_as_far_as_can_be():
    """What it loses, one row would gain, and that is best; the other one loses it."""
    model, unit = make(), 1 / 32767  # of the integers that it becomes
    x = torch.full((32,), 0.499 * unit)
    x[:2] = torch.tensor([1, 29 * unit])
    model.model.norm.weight.zero_()
    model.model.norm.bias.copy_(x)
    loses, gains = torch.full((2, 32), 127.0)
    loses[1] = 0
    gains[2:] = -127
    as_rows(model, loses, gains)
    assert (loses - gains) @ x > 0 > (loses - gains) @ (x / unit).round()
    assert both(model, random_ids(2), is_used=True) == ([5, 5], [5, 5])
