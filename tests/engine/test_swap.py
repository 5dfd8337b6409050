"""Parts of one model are exchanged by one table, and put back."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PretrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hf_scratch_gpt import (
    ScratchGPTForCausalLM,
    optimize_for_generation,
    optimize_for_training,
    restore,
)
from hf_scratch_gpt.engine import half, swap
from hf_scratch_gpt.engine.loss import LossInPieces
from hf_scratch_gpt.engine.packed import PackedFeedForward, PackedLinear
from hf_scratch_gpt.engine.training import LeanAttention, LeanFeedForward, LeanLinear

from ..models import random_gpt2, random_ids, random_model


def classes(model):
    return [type(part) for part in model.modules()]


@pytest.mark.parametrize("optimize", [optimize_for_generation, optimize_for_training])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_restore(optimize, attention):
    model = random_model(ScratchGPTForCausalLM, attn_implementation=attention).eval()
    before, ids = classes(model), random_ids(2, 7)
    attributes = [sorted(vars(part)) for part in model.modules()]
    generation = model.generation_config.to_dict()
    expected = model(ids).logits
    for _ in range(2):
        assert classes(optimize(model)) != before
        copied = restore(copy.deepcopy(model))
        assert restore(model) is model
        for each in (model, copied):
            assert classes(each) == before
            assert [sorted(vars(part)) for part in each.modules()] == attributes
            assert each.config._attn_implementation == attention
            assert each.generation_config.to_dict() == generation
            assert torch.equal(each(ids).logits, expected)
    assert restore(model) is model  # there is nothing to do


@pytest.mark.parametrize("optimize", [optimize_for_generation, optimize_for_training])
def test_copies_and_pickles(optimize, steps):
    """They are optimized as well, each for itself."""
    model, ids = optimize(random_model(ScratchGPTForCausalLM).eval()), random_ids(1, 7)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert classes(other) == classes(model)
        assert other.lm_head.weight is other.model.embed_tokens.weight
        assert torch.equal(other.generate(ids, max_new_tokens=5, do_sample=False), expected)
        other.model.embed_tokens.weight.data.neg_()
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)
    assert len(steps) == (16 if optimize is optimize_for_generation else 0)


def test_from_one_to_the_other(logged_warnings):
    model = optimize_for_training(random_model(ScratchGPTForCausalLM).eval())
    for optimize in (optimize_for_generation, optimize_for_training):
        with pytest.raises(ValueError, match=r"optimized already; call restore\(model\)"):
            optimize(model)
    ids = random_ids(1, 6)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    fast = optimize_for_generation(restore(model))
    assert torch.equal(fast.generate(ids, max_new_tokens=5, do_sample=False), expected)


def test_int8_cannot_be_restored():
    fast = optimize_for_generation(random_model(ScratchGPTForCausalLM).eval(), weights="int8")
    before = classes(fast)
    with pytest.raises(ValueError, match="weights in int8 cannot be restored; load the model"):
        restore(fast)
    assert classes(fast) == before


def test_who_is_exchanged():
    model = random_model(ScratchGPTForCausalLM).eval()
    block = optimize_for_generation(model).model.layers[0]
    assert isinstance(block.mlp, PackedFeedForward)
    for layer in (block.self_attn.q_proj, block.mlp.down_proj, model.lm_head):
        assert isinstance(layer, PackedLinear)
    restore(model)
    block = optimize_for_training(model).model.layers[0]
    assert isinstance(block.self_attn, LeanAttention)
    assert isinstance(block.mlp, LeanFeedForward)
    assert isinstance(block.mlp.up_proj, LeanLinear)
    assert isinstance(model, LossInPieces)
    assert isinstance(model, ScratchGPTForCausalLM)
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not a model of hf_scratch_gpt"):
        optimize_for_training(random_gpt2())


def test_each_name_in_the_table_is_a_class_of_the_models():
    model = random_model(ScratchGPTForCausalLM)
    names = {f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}" for kind in classes(model)}
    named = {name for name in swap._TABLE if isinstance(name, str)}
    assert named <= names
    assert set(swap._TABLE) - named <= set(classes(model))


def test_a_model_with_its_own_code(tmp_path, steps):
    """A saved folder brings its own copy of all classes."""
    model, ids = random_model(ScratchGPTForCausalLM, drop_rate=0.0), random_ids(1, 7)
    model.save_pretrained(tmp_path)
    name = "modeling_scratch_gpt.ScratchGPTForCausalLM"
    kind = get_class_from_dynamic_module(name, str(tmp_path))
    assert not issubclass(kind, ScratchGPTForCausalLM)
    remote = kind.from_pretrained(tmp_path).eval()
    before = classes(remote)
    fast = optimize_for_generation(remote)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(fast.generate(ids, max_new_tokens=5, do_sample=False), expected)
    assert len(steps) == 4
    states = fast(ids, output_hidden_states=True, output_attentions=False).hidden_states
    for own, state in zip(states, model(ids, output_hidden_states=True).hidden_states, strict=True):
        torch.testing.assert_close(own, state, atol=1e-5, rtol=0)
    fast.save_pretrained(tmp_path / "again")
    fields, _ = PretrainedConfig.get_config_dict(tmp_path / "again")
    assert fields["architectures"] == ["ScratchGPTForCausalLM"]
    assert fields["auto_map"]["AutoModelForCausalLM"] == name
    assert classes(restore(fast)) == before
    for each in (model.train(), optimize_for_training(remote).train()):
        each.config.chunked_loss = True
        each(ids, labels=ids).loss.backward()
    for own, exact in zip(remote.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(own.grad, exact.grad, atol=1e-5, rtol=1e-4)


def test_a_model_whose_own_code_was_changed(tmp_path):
    """Under the same names; the engine leaves to it what it does not know."""
    model, ids = random_model(ScratchGPTForCausalLM, drop_rate=0.0), random_ids(1, 7)
    model.save_pretrained(tmp_path)
    code = tmp_path / "blocks_scratch_gpt.py"
    wider = "self.down_proj(2 * self.activation("
    code.write_text(code.read_text().replace("self.down_proj(self.activation(", wider))
    name = "modeling_scratch_gpt.ScratchGPTForCausalLM"
    changed = get_class_from_dynamic_module(name, str(tmp_path)).from_pretrained(tmp_path).eval()
    expected = changed(ids).logits
    assert not torch.allclose(expected, model(ids).logits, atol=1e-2)
    written = changed.generate(ids, max_new_tokens=5, do_sample=False)
    fast = optimize_for_generation(changed)
    assert torch.equal(fast.generate(ids, max_new_tokens=5, do_sample=False), written)
    torch.testing.assert_close(optimize_for_training(restore(fast))(ids).logits, expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_learn(monkeypatch):
    """A model that is optimized, then adapted; its own weights are frozen."""
    monkeypatch.setattr(half, "_IS_AHEAD", True)
    model, ids, results = random_model(ScratchGPTForCausalLM, drop_rate=0.0), random_ids(2, 9), []
    for each in (copy.deepcopy(model), optimize_for_training(model)):
        torch.manual_seed(3)
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
        adapted = get_peft_model(each.train(), config)
        adapted(input_ids=ids, labels=ids).loss.backward()
        results.append([p.grad for p in adapted.parameters() if p.requires_grad])
    assert len(results[0]) == 12
    for exact, own in zip(*results, strict=True):
        torch.testing.assert_close(own, exact, atol=1e-5, rtol=1e-4)


def test_an_error_on_the_way_leaves_the_model_as_it_was(monkeypatch):
    model, ids = random_model(ScratchGPTForCausalLM), random_ids(1, 6)
    before, expected = classes(model), model(ids).logits

    def fail(weight):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("hf_scratch_gpt.engine.swap.RoughHead.of", fail)
        with pytest.raises(MemoryError):
            optimize_for_generation(model)
    assert classes(model) == before
    assert torch.equal(model(ids).logits, expected)
    optimize_for_generation(model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks by it
def test_a_model_within_an_adapters_is_restored():
    model = optimize_for_training(random_model(ScratchGPTForCausalLM))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    restore(adapted)
    optimize_for_generation(adapted.merge_and_unload().eval())


def test_generate_takes_the_default_of_custom_generate():
    model, ids = random_model(ScratchGPTForCausalLM), random_ids(1, 6)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    optimize_for_generation(model)
    found = model.generate(ids, max_new_tokens=4, do_sample=False, custom_generate=None)
    assert torch.equal(found, expected)
