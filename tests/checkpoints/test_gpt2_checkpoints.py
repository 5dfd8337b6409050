"""`from_pretrained` converts any GPT-2 checkpoint in transformers' format while it loads."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)
from transformers.distributed import DistributedConfig

from hf_scratch_gpt import (
    ScratchGPTForCausalLM,
    ScratchGPTForQuestionAnswering,
    ScratchGPTForSequenceClassification,
    ScratchGPTForTokenClassification,
    ScratchGPTModel,
)

from ..models import random_gpt2, random_ids, random_model
from .checkpoints import bare, hf_source, with_masks

PAIRS = {
    "language model": (GPT2LMHeadModel, ScratchGPTForCausalLM),
    "base model": (GPT2Model, ScratchGPTModel),
    "sequence": (GPT2ForSequenceClassification, ScratchGPTForSequenceClassification),
    "token": (GPT2ForTokenClassification, ScratchGPTForTokenClassification),
    "question": (GPT2ForQuestionAnswering, ScratchGPTForQuestionAnswering),
}


def load_exactly(model_class, folder):
    """The model, after a load in which every tensor of the checkpoint found its place."""
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model


@torch.no_grad()
def assert_same_outputs(reference, ours):
    ids = random_ids(2, 12)
    expected, outputs = reference(ids), ours(ids)
    for name in ("logits", "start_logits", "end_logits", "last_hidden_state"):
        if name in expected:
            torch.testing.assert_close(outputs[name], expected[name], atol=1e-5, rtol=0)
    assert {"logits", "start_logits", "last_hidden_state"} & set(outputs)


@pytest.mark.parametrize("kind", PAIRS)
def test_every_head_reads_its_counterpart(kind, tmp_path):
    theirs, ours = PAIRS[kind]
    reference = random_gpt2(theirs, num_labels=5)
    reference.save_pretrained(tmp_path)
    assert_same_outputs(reference, load_exactly(ours, tmp_path))


@pytest.mark.parametrize(
    ("layout", "form"),
    [("safetensors", dict), ("bin", bare), ("sharded safetensors", with_masks)],
)
def test_key_layouts_and_file_formats(layout, form, tmp_path, logged_warnings):
    reference = hf_source(tmp_path, layout, form)
    assert_same_outputs(reference, load_exactly(ScratchGPTForCausalLM, tmp_path))


def test_eleven_layers_keep_their_order(gpt2_folder):
    reference = GPT2LMHeadModel.from_pretrained(gpt2_folder)
    assert_same_outputs(reference, load_exactly(ScratchGPTForCausalLM, gpt2_folder))


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


def test_half_precision_stays_half_precision(small_gpt2, tmp_path):
    GPT2LMHeadModel.from_pretrained(small_gpt2).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_exactly(ScratchGPTForCausalLM, tmp_path).dtype == torch.bfloat16
    assert ScratchGPTForCausalLM.from_pretrained(tmp_path, dtype="float32").dtype == torch.float32


def test_resaved_model_has_our_names_and_needs_no_rule(small_gpt2, tmp_path):
    loaded = load_exactly(ScratchGPTForCausalLM, small_gpt2)
    loaded.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert not [name for name in names if "transformer." in name or "c_attn" in name]
    again = load_exactly(ScratchGPTForCausalLM, tmp_path)
    assert not again._weight_conversions
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_model_from_scratch_saves_tied_weights_once_no_buffers_and_needs_no_rule(tmp_path):
    model = random_model(ScratchGPTForCausalLM)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    parameters = dict(model.named_parameters())  # shared ones named once
    assert tensors.keys() == parameters.keys()
    assert not list(model.named_buffers())
    again = load_exactly(ScratchGPTForCausalLM, tmp_path)
    assert not again._weight_conversions
    for name, parameter in parameters.items():
        assert torch.equal(again.get_parameter(name), parameter), name
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_untied_model_saves_both(tmp_path):
    random_model(ScratchGPTForCausalLM, tie_word_embeddings=False).save_pretrained(tmp_path)
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    again = load_exactly(ScratchGPTForCausalLM, tmp_path)
    assert again.lm_head.weight is not again.model.embed_tokens.weight


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


def test_saving_under_other_names_is_refused(tmp_path):
    with pytest.raises(ValueError, match="save_original_format=True would write"):
        random_model(ScratchGPTForCausalLM).save_pretrained(tmp_path, save_original_format=True)
    assert not list(tmp_path.iterdir())


def test_gpt2_pads_with_its_end_of_text_without_a_warning(tmp_path):
    reference = random_gpt2(pad_token_id=None)
    reference.save_pretrained(tmp_path)
    ours = load_exactly(ScratchGPTForCausalLM, tmp_path)
    assert ours.generation_config.pad_token_id == ours.config.eos_token_id
    ids = random_ids(1, 3)
    assert ours.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2).shape[0] == 1
