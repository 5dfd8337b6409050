"""What is private of torch is where it was, does what it did, and can be done without."""

import copy

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from hf_scratch_gpt import ScratchGPTForCausalLM, optimize_for_generation, optimize_for_training
from hf_scratch_gpt.engine import half, private_ops

from ..models import random_ids, random_model


@pytest.fixture
def without(monkeypatch):
    """Take some of the functions away, as another torch might."""

    def take_away(*names):
        monkeypatch.setattr(
            private_ops, "find", lambda name: None if name in names else original(name)
        )
        private_ops.has_onednn.cache_clear()

    original = private_ops.find
    yield take_away
    private_ops.has_onednn.cache_clear()


@pytest.mark.parametrize("name", private_ops.PLACES)
def test_it_is_there(name):
    assert private_ops.find(name) is not None, f"torch has no {private_ops.PLACES[name]} any more"


@pytest.mark.parametrize("name", private_ops.HOOKS)
def test_hooks_are_kept_there(name):
    assert isinstance(getattr(torch.nn.Linear(1, 1), name), dict)


def test_onednn_multiplies(without):
    """`_linear_pointwise` and `_reorder_linear_weight`, with the arguments that they take."""
    assert private_ops.has_onednn()
    without("linear")
    assert not private_ops.has_onednn()


def test_onednn_of_other_arguments_is_not_used(monkeypatch):
    wrong = {"linear": lambda x, weight: x, "reorder": lambda weight: weight}
    monkeypatch.setattr(private_ops, "find", wrong.get)
    private_ops.has_onednn.cache_clear()
    assert not private_ops.has_onednn()
    private_ops.has_onednn.cache_clear()


def test_who_records(without):
    assert not private_ops.is_recorded()
    with FlopCounterMode(display=False):
        assert private_ops.is_recorded()
        without("is_recorded")
        assert not private_ops.is_recorded()


def test_versions():
    x = torch.zeros(2)
    before = private_ops.version_of(x)
    x.add_(1)
    assert private_ops.version_of(x) > before
    with torch.inference_mode():
        assert private_ops.version_of(torch.zeros(2)) is None


def test_who_watches(without):
    layer = torch.nn.Linear(1, 1)
    assert not private_ops.is_watched(layer)
    for watch in (
        lambda: layer.register_forward_hook(print),
        lambda: layer.register_forward_pre_hook(print),
        lambda: layer.register_full_backward_hook(print),
        lambda: layer.register_full_backward_pre_hook(print),
        lambda: register_module_forward_hook(print),
    ):
        handle = watch()
        assert private_ops.is_watched(layer)
        handle.remove()
    assert not private_ops.is_watched(layer)
    without("has_global_hook")
    assert private_ops.is_watched(layer)


def test_a_model_does_without_all_of_them(without, monkeypatch):
    model, ids = random_model(ScratchGPTForCausalLM, drop_rate=0.0), random_ids(2, 9)
    monkeypatch.setattr(half, "_IS_AHEAD", True)
    expected = model.train()(ids, labels=ids)
    expected.loss.backward()
    own = copy.deepcopy(model)
    own.zero_grad()
    without(*private_ops.PLACES)
    loss = optimize_for_training(own)(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, expected.loss)
    for mine, theirs in zip(own.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4)
    fast = optimize_for_generation(model.eval())
    with torch.no_grad():
        torch.testing.assert_close(fast(ids).logits, expected.logits, atol=1e-5, rtol=1e-5)
