"""Another architecture, in a copy of ours: what the contract, the engine and sizing say of it."""

from pkgutil import resolve_name

import pytest
import torch

from hf_scratch_gpt import optimize_for_generation
from hf_scratch_gpt.sizing import count_parameters, forward_flops_per_token, kv_cache_bytes

from .contracts import copy_of_model, run_contract
from .gated import MATHEMATICS, PROMISES

PLAN = "test_structure.py::test_every_linear_layer_is_in_the_plan"
SPLIT = "test_parallel.py::test_two_processes_agree_with_one[tp]"


@pytest.fixture
def gated(tmp_path, monkeypatch):
    """Make a copy with these changes; the name of its class."""
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name, changes: copy_of_model(tmp_path / name, changes)


def test_the_contract_says_what_the_change_lacks(gated, tmp_path, logged_warnings):
    only = ("-k", "every_linear_layer")
    name = gated("gated1", MATHEMATICS)
    reports = run_contract(tmp_path, name, *only)
    assert reports.failed.keys() == {PLAN}
    assert "not in base_model_tp_plan: ['layers.*.mlp.gate_proj']" in reports.failed[PLAN]
    name = gated("gated2", MATHEMATICS + PROMISES)
    reports = run_contract(tmp_path, name, *only)
    assert not reports.failed
    assert PLAN in reports.passed


@pytest.mark.release
def test_the_whole_contract_fails_at_the_plan_alone(gated, tmp_path, logged_warnings):
    reports = run_contract(tmp_path, gated("gated3", MATHEMATICS))
    assert reports.failed.keys() == {PLAN, SPLIT}
    reports = run_contract(tmp_path, gated("gated4", MATHEMATICS + PROMISES))
    assert not reports.failed
    assert SPLIT in reports.passed


def test_what_knows_our_mathematics_refuses_it(gated):
    model_class = resolve_name(gated("gated5", MATHEMATICS + PROMISES))
    sizes = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = model_class(model_class.config_class(**sizes)).eval()
    expected = model(torch.tensor([[1, 2, 3]])).logits
    with pytest.raises(ValueError, match=r"^Gated5ForCausalLM is not a model of hf_scratch_gpt"):
        optimize_for_generation(model)
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, expected)
    for count in (count_parameters, forward_flops_per_token, kv_cache_bytes):
        with pytest.raises(ValueError, match=r"^Gated5Config is not a ScratchGPTConfig"):
            count(model.config)
