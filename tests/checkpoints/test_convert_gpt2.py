"""The conversion command, end to end."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from hf_scratch_gpt import ScratchGPTForCausalLM
from hf_scratch_gpt.files import new_folder, sha256

from ..commands import convert as main
from ..commands import verify as verify
from ..models import random_gpt2
from .checkpoints import random_weights, textbook


@pytest.fixture
def old(tmp_path):
    """A folder that is there already."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    return folder


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
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.eos_token_id, model.config.eos_token_id) == (399, 399)
    assert model.generation_config.pad_token_id == 399
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 32
    assert tokenizer.get_vocab() == json.loads((openai_tiny / "encoder.json").read_text())
    assert not list(tmp_path.glob(".*"))


SHARD = "model.ckpt.data-00000-of-00001"


def flip(data):
    return data[:100] + bytes([data[100] ^ 1]) + data[101:]


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        (SHARD, flip, rf"{SHARD}: model/\S+ does not match its checksum"),
        (SHARD, lambda data: data[:-100], rf"{SHARD}: model/wte ends at byte .* cut short"),
        ("model.ckpt.index", flip, r"model\.ckpt\.index does not match its checksum"),
        ("checkpoint", lambda _: b"../../etc/passwd", "checkpoint names no checkpoint beside it"),
        (
            "hparams.json",
            lambda data: data.replace(b'"n_layer": 3', b'"n_layer": 4'),
            r"lacks the tensors h\.3\.attn\.c_attn\.bias",
        ),
        ("vocab.bpe", None, r"vocab\.bpe is missing"),
    ],
)
def test_bad_sources_are_refused_and_change_nothing(
    name, spoil, message, openai_tiny, old, tmp_path, capsys, logged_warnings
):
    source = shutil.copytree(openai_tiny, tmp_path / "source")
    content = (source / name).read_bytes()
    (source / name).unlink()
    if spoil:
        (source / name).write_bytes(spoil(content))
    assert main([str(source), str(old), "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error), error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert [path.name for path in old.iterdir()] == ["old.txt"]
    assert main([str(source), str(tmp_path / "new")]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_arguments_that_are_refused(openai_tiny, gpt2_folder, saved_model, tmp_path, capsys):
    LlamaConfig().save_pretrained(tmp_path / "llama")
    (tmp_path / "empty").mkdir()
    textbook(tmp_path / "model.pth", random_weights())
    for arguments, message in (
        ([tmp_path / "llama"], "is a model of type 'llama'; only GPT-2"),
        ([saved_model], f"error: {saved_model} holds a scratch_gpt model already, which needs no"),
        ([tmp_path / "nowhere"], "nowhere"),
        ([tmp_path / "empty"], "empty is not a GPT-2: it has none of"),
        ([gpt2_folder, "--max-shard-size", "abc"], "'abc' is not a size of a file; try 5GB"),
        ([tmp_path / "model.pth"], "pass --num-heads or --preset"),
        ([tmp_path / "model.pth", "--num-heads", "3"], "hidden_size=16 does not divide into"),
    ):
        source, *options = map(str, arguments)
        assert main([source, str(tmp_path / "out"), *options]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.splitlines()[-1].startswith("error: ")
        assert not (tmp_path / "out").exists()


def test_an_interrupted_conversion_leaves_nothing(openai_tiny, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_scratch_gpt.checkpoints.convert.verify", interrupt)
    assert main([str(openai_tiny), str(tmp_path / "out")]) == 130
    assert "nothing was changed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_interrupt_while_the_old_folder_is_replaced_brings_it_back(
    openai_tiny, old, tmp_path, monkeypatch
):
    rename, interrupts = Path.rename, [KeyboardInterrupt]

    def interrupted(path, target):
        if path.parent.suffix == ".unfinished" and interrupts:
            raise interrupts.pop()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    assert main([str(openai_tiny), str(old), "--overwrite"]) == 130
    assert not interrupts
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in old.iterdir()] == ["old.txt"]


def test_a_folder_that_is_there_needs_overwrite_and_returns_if_put_aside(
    openai_tiny, old, tmp_path, capsys
):
    old.rename(tmp_path / ".out-replaced")  # a command was killed behind it
    assert main([str(openai_tiny), str(old)]) == 2
    assert re.search("out exists already.*--overwrite", capsys.readouterr().err)
    assert (old / "old.txt").read_text() == "old"
    # The command may be killed after it, too: the new folder is there, the old one to be removed.
    shutil.copytree(old, tmp_path / ".out-replaced")
    assert main([str(openai_tiny), str(old), "--overwrite"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (old / "old.txt").exists()
    assert (old / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["out", "o[u]t", "*"])
def test_only_what_is_abandoned_and_ones_own_is_removed(name, openai_tiny, tmp_path):
    others = [f".{name}-medium-abcdefgh.unfinished", ".other-abcdefgh.unfinished", f".{name}-x"]
    abandoned = f".{name}-abcdefgh.unfinished"
    for folder in (*others, abandoned):
        (tmp_path / folder / "out").mkdir(parents=True)
    (tmp_path / abandoned / "lock").touch()
    with new_folder(tmp_path / name) as complete:  # a conversion that goes on meanwhile
        complete.mkdir()
        assert main([str(openai_tiny), str(tmp_path / name)]) == 0
        assert complete.exists()
    assert {path.name for path in tmp_path.iterdir()} == {*others, name}


def test_a_source_in_the_folder_to_replace_is_refused(openai_tiny, tmp_path, capsys):
    source = tmp_path / "out" / "source"
    shutil.copytree(openai_tiny, source)
    linked = tmp_path / "linked"
    linked.symlink_to(source)
    for arguments in (
        [source, source],
        [source, source.parent],
        [linked, source],
        [openai_tiny, source, "--tokenizer", source],
    ):
        assert main([*map(str, arguments), "--overwrite"]) == 2
        assert "holds the source" in capsys.readouterr().err
        assert (source / "hparams.json").exists()


def test_places_of_the_result(openai_tiny, old, tmp_path, capsys, monkeypatch):
    (tmp_path / "real").mkdir()
    for link, target in (("link", "real"), ("dangling", "nowhere")):
        (tmp_path / link).symlink_to(tmp_path / target)
        assert main([str(openai_tiny), str(tmp_path / link)]) == 0
        assert (tmp_path / link).is_symlink()
        assert (tmp_path / target / "model.safetensors").exists()
    capsys.readouterr()
    monkeypatch.chdir(old)
    for place, message in ((".", "working dir"), ("..", "working dir"), ("old.txt", "is a file")):
        assert main([str(openai_tiny), place, "--overwrite"]) == 2
        assert message in capsys.readouterr().err
    assert (old / "old.txt").exists()


@pytest.mark.parametrize("size", ["5KB", "40KB"])
def test_shards_smaller_than_a_tensor(size, small_gpt2, converted_gpt2, tmp_path):
    assert main([str(small_gpt2), str(tmp_path / "parts"), "--max-shard-size", size]) == 0
    files = list((tmp_path / "parts").glob("*.safetensors"))
    parts = {name: tensor for file in files for name, tensor in load_file(file).items()}
    whole = load_file(converted_gpt2 / "model.safetensors")
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    card = (tmp_path / "parts" / "README.md").read_text()
    assert all(sha256(file) in card for file in files)
    model = ScratchGPTForCausalLM.from_pretrained(tmp_path / "parts")
    assert torch.equal(model.lm_head.weight, whole["model.embed_tokens.weight"])


def test_generation_settings_stay(tmp_path, capsys):
    model = random_gpt2()
    settings = {"do_sample": True, "temperature": 0.7, "max_new_tokens": 11}
    model.generation_config.update(**settings, pad_token_id=None)
    model.save_pretrained(tmp_path / "source")
    assert main([str(tmp_path / "source"), str(tmp_path / "out")]) == 0
    generation = ScratchGPTForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert {name: getattr(generation, name) for name in settings} == settings
    assert generation.pad_token_id == model.config.pad_token_id
    (tmp_path / "source" / "generation_config.json").write_text("{")
    assert main([str(tmp_path / "source"), str(tmp_path / "bad")]) == 2
    assert "generation_config.json" in capsys.readouterr().err


def test_model_card_names_the_source_and_the_type(openai_tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(openai_tiny)
    assert main([".", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Converted from `openai-tiny` (OpenAI release)" in card
    assert "400 tokens, in bfloat16." in card


@pytest.mark.long
def test_termination_cleans_up(openai_tiny, tmp_path):
    command = [sys.executable, "-m", "conversion.convert_gpt2", str(openai_tiny)]
    options = dict(cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL, text=True)
    process = subprocess.Popen([*command, str(tmp_path / "out")], stderr=subprocess.PIPE, **options)
    while process.poll() is None and not list(tmp_path.glob(".out-*.unfinished/out")):
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    assert process.returncode == 130, error
    assert "stopped; nothing was changed" in error
    assert not list(tmp_path.iterdir())


def test_verification_notices_a_wrong_value_and_another_size(
    gpt2_folder, small_gpt2, converted_gpt2, tmp_path, capsys
):
    out = shutil.copytree(converted_gpt2, tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    tensors["model.embed_positions.weight"][-1, 0] += 5
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for source, message in (
        (small_gpt2, "the conversion is wrong"),
        (gpt2_folder, "has n_layer=2, and"),
    ):
        assert verify([str(source), str(out)]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
