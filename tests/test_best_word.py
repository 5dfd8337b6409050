"""The word that scores highest, found in a rough copy of the head, is that of all scores."""

import copy

import pytest
import torch
from transformers import DynamicCache

from hf_scratch_gpt import ScratchGPTForCausalLM, optimize_for_generation
from hf_scratch_gpt.fast_linear import PackedLinear
from hf_scratch_gpt.one_token import Memory, OneToken, best_word
from hf_scratch_gpt.products import WAYS

from .models import random_ids, random_model

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="the copy is kept beside oneDNN's"
)


def make(**changes):
    model = random_model(ScratchGPTForCausalLM, tie_word_embeddings=False, **changes).eval()
    optimize_for_generation(model)
    return model


@torch.no_grad()
def after_a_prompt(model, way=0):
    cache, ids = DynamicCache(config=model.config), torch.arange(5)[None]
    model(ids, past_key_values=cache)
    return OneToken(model, Memory(model.config, model.dtype), cache, way)


@torch.no_grad()
def both(model, tokens, way=0):
    """The best after each of `tokens`, and the best of all scores after each."""
    one, other = after_a_prompt(model, way), after_a_prompt(model, way)
    quick = [one.best_after(token[None, None]) for token in tokens]
    whole = [best_word(other.logits_after(token[None, None])[:, -1]) for token in tokens]
    return torch.cat(quick).flatten().tolist(), torch.cat(whole).flatten().tolist()


def with_head(change):
    """A model whose head was changed before it was optimized."""
    model = random_model(ScratchGPTForCausalLM, tie_word_embeddings=False).eval()
    with torch.no_grad():
        change(model.lm_head.weight)
    optimize_for_generation(model)
    return model


def nearly_equal(weight):
    weight[:] = weight[0] * (1 + 1e-6 * torch.randn(len(weight), 1))


def equal(weight):
    weight[:] = weight[0]


def in_pairs(weight):
    weight[1::2] = weight[: len(weight) - 1 : 2]


def tiny(weight):
    weight *= 1e-30


def large(weight):
    weight *= 1e15


def of_unlike_rows(weight):
    weight *= torch.logspace(-10, 10, len(weight))[:, None]


HEADS = (nearly_equal, equal, in_pairs, tiny, large, of_unlike_rows, torch.zero_, torch.abs_)


@pytest.mark.parametrize("change", HEADS, ids=lambda change: change.__name__)
def test_it_is_that_of_all_scores(change):
    model = with_head(change)
    assert model.lm_head.rough is not None
    before = torch.get_num_threads()
    try:
        for threads, way in zip((1, 2, 3, 2), WAYS, strict=True):
            torch.set_num_threads(threads)
            quick, whole = both(model, random_ids(10), way)
            assert quick == whole
    finally:
        torch.set_num_threads(before)


def test_equal_rows_give_the_first():
    assert set(both(with_head(equal), random_ids(10))[0]) == {0}


@torch.no_grad()
def test_no_product_is_off_by_more_than_its_error():
    model = make(hidden_size=256)
    head = model.lm_head
    exact, rough, errors = head.weight.double(), head.rough.weight.double(), head.rough.errors
    worst = exact - rough  # a vector along the error itself
    for vectors in (worst, torch.randn(50, 256, dtype=torch.float64)):
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
        off = (vectors @ (exact - rough).T).abs()
        assert (off <= errors).all()
    assert (off.amax(0) > 0).any()
    own = (worst / worst.norm(dim=1, keepdim=True) * worst).sum(1)
    assert (errors < 2 * own).all()  # and it is no more than is needed


@torch.no_grad()
def test_the_copy_decides_what_is_read():
    model = make()
    tokens = random_ids(1)
    quick, whole = both(model, tokens)
    assert quick == whole
    model.lm_head.rough.weight[whole[0]] = -model.lm_head.rough.weight[whole[0]]
    quick, still = both(model, tokens)
    assert still == whole
    assert quick != whole


@pytest.mark.parametrize("number", [torch.inf, torch.nan, 3e38])
@torch.no_grad()
def test_numbers_beyond_measure(number):
    model, tokens = make(), random_ids(4)
    model.model.norm.bias[3] = number
    quick, whole = both(model, tokens)
    assert quick == whole
    in_the_head = with_head(lambda weight: weight[5, 3:4].fill_(number))
    assert (in_the_head.lm_head.rough is None) == (number != 3e38)
    quick, whole = both(in_the_head, tokens)
    assert quick == whole


@pytest.mark.parametrize("size", [1e-4, 1e-25])
@pytest.mark.parametrize("of_head", [1, 1e-20])
@torch.no_grad()
def test_vectors_that_are_nearly_nothing(size, of_head):
    model = with_head(lambda weight: weight.uniform_(0, of_head))
    for part in model.model.norm.parameters():
        part.mul_(size)
    quick, whole = both(model, random_ids(50))
    assert quick == whole


@torch.no_grad()
def test_a_sum_that_overflows_on_its_way():
    """In float32; that of the rough numbers does not."""
    model = make()
    head, norm = model.lm_head, model.model.norm
    norm.weight.zero_()
    norm.bias.fill_(1e19)
    head.weight.zero_()
    head.weight[3, :2] = torch.tensor([3.3e19, -3.3e19])
    head.weight[9, 0] = 1e19
    quick, whole = both(model, random_ids(1))
    assert quick == whole
    assert head.keep_rough() is not None
    quick, whole = both(model, random_ids(1))
    assert quick == whole


@torch.no_grad()
def test_changed_weights_are_seen():
    model, tokens = make(), random_ids(6)
    before, whole = both(model, tokens)
    assert before == whole
    copied = copy.deepcopy(model)
    assert copied.lm_head.rough is model.lm_head.rough
    model.lm_head.weight.neg_()
    assert model.lm_head.rough is None
    quick, whole = both(model, tokens)
    assert quick == whole
    assert quick != before
    assert both(copied, tokens)[0] == before


@torch.no_grad()
def test_a_bias_and_another_row_that_come_later_are_seen():
    model, tokens = make(), random_ids(4)
    best = both(model, tokens)[1]
    model.lm_head.weight.data[90] = 3 * model.lm_head.weight.data[best[0]]
    assert model.lm_head.rough is None
    quick, whole = both(model, tokens)
    assert quick == whole
    assert whole[0] == 90
    model = make()
    model.lm_head.bias = torch.nn.Parameter(1000 * torch.eye(97)[7])
    quick, whole = both(model, tokens)
    assert quick == whole == [7] * 4


def test_who_has_no_copy():
    half = random_model(ScratchGPTForCausalLM).eval().bfloat16()
    assert getattr(optimize_for_generation(half).lm_head, "rough", None) is None
    in_int8 = random_model(ScratchGPTForCausalLM).eval()
    assert not hasattr(optimize_for_generation(in_int8, weights="int8").lm_head, "rough")
    with_bias = torch.nn.Linear(4, 4)
    PackedLinear.take_over(with_bias)
    assert with_bias.keep_rough() is None


def at_the_bound(weight):
    """Rows 5 and 60 are rounded as far as can be, one down, the other up; the lower one is best."""
    weight.zero_()
    weight[5] = 1 + 0.999 * 2**-8  # becomes 1
    weight[60] = 1 + 1.001 * 2**-8  # becomes 1 + 2**-7
    weight[60, -1] -= 32 * 0.002 * 2**-8 * 1.05


def test_errors_as_large_as_can_be():
    model = with_head(at_the_bound)
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.model.norm.bias.fill_(1)
    rough = model.lm_head.rough.weight.float().sum(1)
    assert rough[60] > rough[5]
    assert both(model, random_ids(2)) == ([5, 5], [5, 5])
