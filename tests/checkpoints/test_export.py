"""The export command: what it refuses, and what it leaves."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_scratch_gpt import ScratchGPTForCausalLM, ScratchGPTModel
from hf_scratch_gpt.checkpoints.verify import gpt2_config

from ..commands import export as main
from ..models import random_ids, random_model

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def saved(tmp_path):
    """A saved model of ours."""
    folder = tmp_path / "saved"
    random_model(ScratchGPTForCausalLM, num_hidden_layers=2).save_pretrained(folder)
    return folder


def edit(change):
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (write("model.safetensors", bytes(99)), "model.safetensors is not a complete safetensors"),
        (edit(lambda tensors: tensors.pop(WEIGHT)), f"lacks the tensors {WEIGHT}"),
        (edit(lambda tensors: tensors.update(extra=torch.ones(2))), "has no place for extra"),
        (edit(lambda tensors: tensors.update({WEIGHT: torch.ones(3)})), f"{WEIGHT} has shape [3]"),
        (edit(lambda tensors: tensors[WEIGHT].fill_(math.nan)), f"{WEIGHT} holds NaN or infinity"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (write("config.json", b"{"), "config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
    ],
)
def test_bad_models_are_refused_in_one_line(spoil, message, saved, tmp_path, capsys):
    spoil(saved)
    assert main([str(saved), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_other_kinds_of_model_are_refused(gpt2_folder, tmp_path, capsys):
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))
    llama.save_pretrained(tmp_path / "llama")
    for source, kind in ((tmp_path / "llama", "llama"), (gpt2_folder, "gpt2")):
        assert main([str(source), str(tmp_path / "out")]) == 2
        assert f"is of a model of type '{kind}'" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "nowhere/config.json is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_class", "options"),
    [
        (ScratchGPTForCausalLM, {}),
        (ScratchGPTForCausalLM, {"tie_word_embeddings": False, "qkv_bias": False}),
        (ScratchGPTModel, {}),
    ],
)
def test_logits_and_generation_settings_stay(model_class, options, tmp_path):
    model = random_model(model_class, **options)
    if model_class is ScratchGPTForCausalLM:
        model.generation_config.update(do_sample=True, temperature=0.7)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert main([str(tmp_path / "saved"), str(tmp_path / "out")]) == 0
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    ours = ScratchGPTForCausalLM.from_pretrained(tmp_path / "saved")
    ids = random_ids(2, 20)
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-5, rtol=0)
    assert theirs.generation_config.temperature == ours.generation_config.temperature
    assert theirs.generation_config.eos_token_id == ours.generation_config.eos_token_id


# Of huggingface.co/openai-community/gpt2, config.json, but for `task_specific_params`, which
# transformers no longer knows. llama.cpp's converter reads `n_ctx`.
PUBLISHED = """activation_function architectures attn_pdrop bos_token_id embd_pdrop eos_token_id
    initializer_range layer_norm_epsilon model_type n_ctx n_embd n_head n_layer n_positions
    resid_pdrop summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj vocab_size"""


def test_the_configuration_has_every_key_that_openais_has(converted_tiny, openai_tiny, tmp_path):
    assert main([str(converted_tiny), str(tmp_path / "out")]) == 0
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(PUBLISHED.split()) <= fields.keys()
    hparams = json.loads((openai_tiny / "hparams.json").read_text())
    assert {name: fields[name.replace("n_vocab", "vocab_size")] for name in hparams} == hparams


def test_the_tokenizer_needs_none_of_our_code(converted_tiny, tmp_path):
    assert main([str(converted_tiny), str(tmp_path / "out")]) == 0
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert not settings.keys() & {"auto_map", "is_local", "local_files_only"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(tokenizer).__module__.startswith("transformers.")
    assert not list((tmp_path / "out").glob("*.py"))


def test_wrong_exports_are_noticed_and_the_source_stays(saved, tmp_path, capsys, monkeypatch):
    assert main([str(saved), str(saved), "--overwrite"]) == 2
    assert "holds the source" in capsys.readouterr().err

    def lose_an_activation(config):
        made = gpt2_config(config)
        made.activation_function = "relu"
        return made

    monkeypatch.setattr("hf_scratch_gpt.checkpoints.convert.gpt2_config", lose_an_activation)
    assert main([str(saved), str(tmp_path / "out")]) == 1
    assert "has activation_function=gelu_new, and" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
