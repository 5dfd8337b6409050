"""Weights that move to large pages stay what they were."""

import copy
import gc

import pytest
import torch
from torch import nn

from hf_scratch_gpt.engine import large_pages
from hf_scratch_gpt.engine.large_pages import move_to_large_pages


def make(dtype=torch.float32):
    return [nn.Parameter(torch.randn(*shape).to(dtype)) for shape in ((3, 5), (700, 800), (1,))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_numbers_elsewhere(dtype):
    parameters = make(dtype)
    before = copy.deepcopy(parameters)
    places = [parameter.data_ptr() for parameter in parameters]
    move_to_large_pages(parameters)
    gc.collect()
    for parameter, exact, place in zip(parameters, before, places, strict=True):
        assert torch.equal(parameter, exact)
        assert parameter.requires_grad
        assert parameter.data_ptr() % 64 == 0
        if hasattr(large_pages.mmap, "MADV_HUGEPAGE"):
            assert parameter.data_ptr() != place
        assert parameter.untyped_storage().nbytes() == parameter.nbytes  # saved alone
    parameters[1].detach().zero_()
    assert torch.equal(parameters[0], before[0])
    assert torch.equal(parameters[2], before[2])


def test_int8_and_what_is_empty():
    parameters = [torch.arange(100, dtype=torch.int8), torch.empty(0, 4)]
    move_to_large_pages(parameters)
    assert parameters[0].tolist() == list(range(100))
    move_to_large_pages([])


def test_tied_weights_stay_tied():
    one = nn.Parameter(torch.randn(4, 6))
    other = nn.Parameter(one.data)
    move_to_large_pages([one, other, one])
    assert one.data_ptr() == other.data_ptr()


def test_what_stays_where_it_is():
    strided = nn.Parameter(torch.randn(6, 4).T)
    shared = nn.Parameter(torch.randn(5, 5))
    shared.share_memory_()
    places = strided.data_ptr(), shared.data_ptr()
    move_to_large_pages([strided, shared])
    assert (strided.data_ptr(), shared.data_ptr()) == places
    assert shared.is_shared()


def test_a_system_without_them(monkeypatch):
    parameters = make()
    places = [parameter.data_ptr() for parameter in parameters]
    monkeypatch.delattr(large_pages.mmap, "MADV_HUGEPAGE", raising=False)
    move_to_large_pages(parameters)
    assert [parameter.data_ptr() for parameter in parameters] == places
    monkeypatch.setattr(large_pages.mmap, "MADV_HUGEPAGE", 9999, raising=False)
    move_to_large_pages(parameters)  # the system refuses
    assert [parameter.data_ptr() for parameter in parameters] == places
