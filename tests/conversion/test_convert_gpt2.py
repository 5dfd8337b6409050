"""The conversion command, end to end."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, LlamaConfig

from conversion.convert_gpt2 import main
from hf_scratch_gpt import ScratchGPTForCausalLM

from ..models import random_gpt2, random_ids


@torch.no_grad()
def test_openai_release_gives_openais_logits_through_conversion_and_reload(
    openai_tiny, tmp_path, capsys
):
    out = tmp_path / "out"
    assert main([str(openai_tiny), str(out)]) == 0
    assert "105,648 parameters" in capsys.readouterr().out
    reference = np.load(openai_tiny / "reference_logits.npz")
    model = AutoModelForCausalLM.from_pretrained(out)
    logits = model(torch.from_numpy(reference["input_ids"]).long()).logits.numpy()
    np.testing.assert_allclose(logits, reference["logits"], atol=1e-5, rtol=0)


def test_result_is_complete(openai_tiny, tmp_path):
    assert main([str(openai_tiny), str(tmp_path / "out")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token_id, model.config.eos_token_id) == (399, 399)
    assert model.generation_config.pad_token_id == 399
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 32
    encoder = json.loads((openai_tiny / "encoder.json").read_text())
    assert tokenizer.get_vocab() == encoder
    assert not list(tmp_path.glob(".*"))


@torch.no_grad()
def test_transformers_gpt2_with_its_vocabulary(openai_tiny, tmp_path):
    source = tmp_path / "source"
    random_gpt2(vocab_size=400).save_pretrained(source)
    shutil.copy(openai_tiny / "encoder.json", source / "vocab.json")
    shutil.copy(openai_tiny / "vocab.bpe", source / "merges.txt")
    assert main([str(source), str(tmp_path / "out")]) == 0
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 400


@torch.no_grad()
def test_transformers_gpt2_without_a_vocabulary(gpt2_folder, tmp_path):
    assert main([str(gpt2_folder), str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "vocab.json").exists()
    ids = random_ids(2, 12)
    expected = GPT2LMHeadModel.from_pretrained(gpt2_folder)(ids).logits
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_dtype(openai_tiny, tmp_path):
    assert main([str(openai_tiny), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert ScratchGPTForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_existing_folder_needs_overwrite(openai_tiny, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("keep me")
    assert main([str(openai_tiny), str(out)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "precious.txt").read_text() == "keep me"
    assert main([str(openai_tiny), str(out), "--overwrite"]) == 0
    assert not (out / "precious.txt").exists()
    assert (out / "model.safetensors").exists()


def damage_shard(folder):
    shard = folder / "model.ckpt.data-00000-of-00001"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)


def cut_shard(folder):
    shard = folder / "model.ckpt.data-00000-of-00001"
    shard.write_bytes(shard.read_bytes()[:-100])


def damage_index(folder):
    index = folder / "model.ckpt.index"
    data = bytearray(index.read_bytes())
    data[100] ^= 1
    index.write_bytes(data)


def lead_out_of_the_folder(folder):
    (folder / "checkpoint").write_text('model_checkpoint_path: "../../etc/passwd"\n')


def claim_another_size(folder):
    hparams = json.loads((folder / "hparams.json").read_text())
    (folder / "hparams.json").write_text(json.dumps({**hparams, "n_layer": 4}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage_shard, r"model\.ckpt\.data-00000-of-00001: model/\S+ does not match its checksum"),
        (cut_shard, r"model\.ckpt\.data-00000-of-00001: model/wte ends at byte .* cut short"),
        (damage_index, r"model\.ckpt\.index does not match its checksum"),
        (lead_out_of_the_folder, r"checkpoint names no checkpoint beside it"),
        (claim_another_size, r"lacks the tensors h\.3\.ln_1\.weight"),
        (lambda folder: (folder / "vocab.bpe").unlink(), r"vocab\.bpe is missing"),
    ],
    ids=["flipped bit", "cut shard", "flipped index bit", "escape", "more layers", "no merges"],
)
@pytest.mark.parametrize("there", [False, True])
def test_bad_sources_are_refused_and_leave_nothing(
    spoil, message, there, openai_tiny, tmp_path, capsys, logged_warnings
):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(openai_tiny, source)
    spoil(source)
    if there:
        out.mkdir()
        (out / "old.txt").write_text("old")
    assert main([str(source), str(out), "--overwrite"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error), error
    assert [path.name for path in tmp_path.iterdir() if path != source] == ["out"] * there
    assert [path.name for path in out.glob("*")] == ["old.txt"] * there


def test_another_kind_of_model_is_refused(tmp_path, capsys):
    LlamaConfig().save_pretrained(tmp_path / "llama")
    assert main([str(tmp_path / "llama"), str(tmp_path / "out")]) == 1
    assert "is a model of type 'llama'; only GPT-2" in capsys.readouterr().err


def test_missing_source(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interrupted_conversion_leaves_nothing(openai_tiny, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("conversion.convert_gpt2.verify", interrupt)
    assert main([str(openai_tiny), str(tmp_path / "out")]) == 130
    assert "nothing was changed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
