"""What has been optimized for generation, and is changed all the same."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import prune
from torch.testing._internal.two_tensor import TwoTensor

from hf_scratch_gpt import ScratchGPTForCausalLM, optimize_for_generation
from hf_scratch_gpt.engine.one_token import can_compute

from ..models import random_ids, random_model


def saved(folder, seed):
    torch.manual_seed(seed)
    random_model(ScratchGPTForCausalLM).save_pretrained(folder / str(seed))
    return ScratchGPTForCausalLM.from_pretrained(folder / str(seed)).eval()


def assigned(model, folder):
    """All weights replaced by others that are as fresh."""
    model.load_state_dict(saved(folder, 9).state_dict(), assign=True)
    model.tie_weights()
    return model


def replaced(model, folder):
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach() + 1)
    return model


def moved_there_and_back(model, folder):
    return model.to(torch.bfloat16).float()


def pruned(model, folder):
    prune.l1_unstructured(model.model.layers[1].self_attn.v_proj, "weight", 0.5)
    return model


def merged(model, folder):
    torch.manual_seed(5)
    config = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):  # PEFT asks by an old name
        return get_peft_model(model, config).merge_and_unload()


def written_to(model, folder):
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 4] += 1
    return model


@pytest.mark.parametrize(
    "change", [assigned, replaced, moved_there_and_back, pruned, merged, written_to]
)
@torch.no_grad()
def test_the_new_weights_are_used(change, tmp_path):
    model, ids = saved(tmp_path, 1), random_ids(2, 7)
    before = model(ids).logits
    fast = optimize_for_generation(copy.deepcopy(model))
    expected = change(model, tmp_path)(ids).logits
    assert (expected - before).abs().max() > 1e-4
    torch.testing.assert_close(change(fast, tmp_path)(ids).logits, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("when", ["before", "after"])
def test_tensors_of_another_kind_are_left_to_torch(when):
    model, ids = random_model(ScratchGPTForCausalLM, tie_word_embeddings=False), random_ids(1, 7)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    if when == "after":
        optimize_for_generation(model)
    layer = model.model.layers[1].mlp.up_proj
    half = layer.weight.detach()
    layer.weight = nn.Parameter(TwoTensor(half, half.clone()), requires_grad=False)
    if when == "before":
        optimize_for_generation(model)
    assert not can_compute(model)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)


def test_int8_is_neither_saved_nor_loaded(tmp_path):
    model = random_model(ScratchGPTForCausalLM)
    weights = model.state_dict()
    fast = optimize_for_generation(copy.deepcopy(model), "int8")
    ids = random_ids(1, 9)
    expected = fast(ids).logits
    for save_or_load in (
        lambda: fast.model.save_pretrained(tmp_path),
        lambda: fast.state_dict(),
        lambda: fast.load_state_dict(weights, strict=False),
    ):
        with pytest.raises(ValueError, match=r"in int8; .* before"):
            save_or_load()
    assert torch.equal(fast(ids).logits, expected)
    assert not list(tmp_path.glob("*.safetensors"))


def test_int8_scales_keep_their_digits():
    model = random_model(ScratchGPTForCausalLM)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight *= 1e-5
    fast, ids = optimize_for_generation(copy.deepcopy(model), "int8"), random_ids(1, 9)
    layer, before = fast.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 32)
    expected = layer(x)
    fast.half()
    assert layer.weight_scale.dtype == torch.float32
    torch.testing.assert_close(layer(x.half()).float(), expected, atol=1e-2, rtol=1e-2)
    assert (before(x) - before.bias).abs().max() < 1e-3
    assert fast(ids).logits.isfinite().all()
