"""What the tests of the engine share."""

import os

# Before the C++ is loaded: threads that wait are not to keep a processor busy meanwhile.
os.environ["OMP_WAIT_POLICY"] = "passive"

import pytest
import torch

from hf_scratch_gpt.engine.one_token import OneToken


@pytest.fixture
def steps(monkeypatch):
    """One entry for each token that the C++ reads."""
    taken, read = [], OneToken._read
    monkeypatch.setattr(OneToken, "_read", lambda *given: taken.append(1) or read(*given))
    return taken


@pytest.fixture(params=[False, True], ids=["half", "no-half"])
def slow_half(request, monkeypatch):
    """A CPU that has instructions for half precision, then one that has none."""
    slow = frozenset([torch.bfloat16, torch.float16] if request.param else [])
    monkeypatch.setattr("hf_scratch_gpt.engine.half._SLOW_DTYPES", slow)
    return request.param


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads wait for one another, for long where other programs run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
