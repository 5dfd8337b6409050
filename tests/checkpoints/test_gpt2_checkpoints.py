"""`from_pretrained` converts any GPT-2 checkpoint in transformers' format while it loads."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, load_model, save_file, save_model
from transformers import GPT2LMHeadModel
from transformers.distributed import DistributedConfig

from hf_scratch_gpt import ScratchGPTForCausalLM

from ..models import CLASSES, random_gpt2, random_ids, random_model
from .checkpoints import hf_source


def load_exactly(model_class, folder):
    """The model, after a load in which every tensor of the checkpoint found its place."""
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model


@torch.no_grad()
def assert_same_outputs(reference, ours):
    ids = random_ids(2, 12)
    expected, outputs = reference(ids), ours(ids)
    compared = {"logits", "start_logits", "end_logits", "last_hidden_state"} & set(expected)
    assert compared
    for name in compared:
        torch.testing.assert_close(outputs[name], expected[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("ours", CLASSES)
def test_every_head_reads_its_counterpart(ours, tmp_path):
    name = ours.__name__.replace("ScratchGPT", "GPT2").replace("ForCausalLM", "LMHeadModel")
    reference = random_gpt2(getattr(transformers, name), num_labels=5)
    reference.save_pretrained(tmp_path)
    assert_same_outputs(reference, load_exactly(ours, tmp_path))


def test_a_tensor_that_belongs_nowhere_is_reported(small_gpt2, tmp_path, logged_warnings):
    GPT2LMHeadModel.from_pretrained(small_gpt2).config.save_pretrained(tmp_path)
    tensors = load_file(small_gpt2 / "model.safetensors")
    tensors["transformer.h.0.attn.surprise"] = torch.ones(3)
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, report = ScratchGPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert report["unexpected_keys"] == {"layers.0.attn.surprise"}
    assert report["missing_keys"] == {"model.layers.1.mlp.up_proj.weight"}
    assert any("surprise" in warning for warning in logged_warnings)


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_tools_that_write_storages_write_each_tensor_once(layout, tmp_path):
    reference = hf_source(tmp_path, layout)
    model = ScratchGPTForCausalLM.from_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name
    save_model(model, tmp_path / "all.safetensors")
    again = random_model(ScratchGPTForCausalLM)
    load_model(again, tmp_path / "all.safetensors")
    assert_same_outputs(reference, again)


def test_half_precision_stays_half_precision(small_gpt2, tmp_path):
    GPT2LMHeadModel.from_pretrained(small_gpt2).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_exactly(ScratchGPTForCausalLM, tmp_path).dtype == torch.bfloat16
    assert ScratchGPTForCausalLM.from_pretrained(tmp_path, dtype="float32").dtype == torch.float32


@pytest.mark.parametrize("source", ["gpt2", "tied", "untied"])
def test_saved_models_have_our_names_and_need_no_rule(source, small_gpt2, tmp_path):
    if source == "gpt2":
        model = load_exactly(ScratchGPTForCausalLM, small_gpt2)
    else:
        model = random_model(ScratchGPTForCausalLM, tie_word_embeddings=source == "tied")
    with pytest.raises(ValueError, match="save_original_format=True would write"):
        model.save_pretrained(tmp_path, save_original_format=True)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)
    parameters = dict(model.named_parameters())  # shared ones named once
    assert load_file(tmp_path / "model.safetensors").keys() == parameters.keys()
    assert ("lm_head.weight" in parameters) == (source == "untied")
    assert not [name for name in parameters if "transformer." in name or "c_attn" in name]
    assert not list(model.named_buffers())
    again = load_exactly(ScratchGPTForCausalLM, tmp_path)
    assert not again._weight_conversions
    for name, parameter in parameters.items():
        assert torch.equal(again.get_parameter(name), parameter), name
    tied = again.lm_head.weight is again.model.embed_tokens.weight
    assert tied == (source != "untied")


@pytest.mark.parametrize("size", ["tp_size", "fsdp_size"])
def test_splitting_a_gpt2_checkpoint_over_devices_is_refused(size, small_gpt2):
    with pytest.raises(ValueError, match=r"is a GPT-2 checkpoint.*save_pretrained"):
        ScratchGPTForCausalLM.from_pretrained(
            small_gpt2, distributed_config=DistributedConfig(**{size: 2})
        )


def test_heads_that_do_not_divide_among_devices_are_refused():
    model = random_model(ScratchGPTForCausalLM)
    with pytest.raises(ValueError, match=r"4 attention heads do not divide among tp_size=3"):
        ScratchGPTForCausalLM.maybe_distribute_model(model, DistributedConfig(tp_size=3), None)


def test_a_gpt2_configuration_object_is_refused():
    with pytest.raises(ValueError, match=r"takes a ScratchGPTConfig, not a GPT2Config"):
        ScratchGPTForCausalLM(random_gpt2().config)


def test_gpt2_pads_with_its_end_of_text_without_a_warning(tmp_path):
    reference = random_gpt2(pad_token_id=None)
    reference.save_pretrained(tmp_path)
    ours = load_exactly(ScratchGPTForCausalLM, tmp_path)
    assert ours.generation_config.pad_token_id == ours.config.eos_token_id
    ids = random_ids(1, 3)
    assert ours.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2).shape[0] == 1
