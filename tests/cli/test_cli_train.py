"""`train`, as somebody who has a text and nothing else calls it."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_scratch_gpt.cli.train import in_options


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_scratch_gpt.training.corpus.CACHE", tmp_path / "cache")
    monkeypatch.setattr("hf_scratch_gpt.training.vocabularies.CACHE", tmp_path / "cache")
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be, that is the question. " * 400)
    return path


def test_a_text_is_enough(text, tmp_path, run):
    """A text, and where the model goes; results on stdout, all else on stderr."""
    arguments = ["train", text, "--output-dir", tmp_path / "run", "--epochs", 1]
    code, out, error = run(*arguments, columns=200)
    assert code == 0, error
    assert re.fullmatch(r"\d+ steps, loss \d\.\d+ nats per token; the model, .* are in .*\n", out)
    lines = error.splitlines()
    assert lines[0].startswith("Vocabulary: ")
    assert any(line.startswith("Training: ") for line in lines)
    assert "\x1b" not in error
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "run").config
    assert (config.num_hidden_layers, config.hidden_size) == (4, 128)
    code, out, error = run(*arguments, "--epochs", 1)
    assert "as it was before" in out
    code, out, error = run("generate", tmp_path / "run", "To be", "--max-new-tokens", 8, "--plain")
    assert code == 0, error
    assert out.startswith("To be")


def test_sizes_and_training_as_people_write_them(text, tmp_path, run, monkeypatch):
    sizes = ["--n-layer", 2, "--n-head", 2, "--n-embd", 32, "--block-size", 16]
    training = ["--lr", 0.01, "--batch-size", 4, "--max-steps", 3, "--weight-decay", 0]
    arguments = ["train", *training, text, "--tokenizer", "char", *sizes]
    code, _, error = run(*arguments, "--output-dir", tmp_path / "run")
    assert code == 0, error
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [record[f"model.{name}"] for name in ("hidden_size", "max_position_embeddings")] == [
        32,
        16,
    ]
    names = ("learning_rate", "batch_size", "max_steps", "weight_decay", "block_size")
    assert [record[name] for name in names] == [0.01, 4, 3, 0, 16]
    # Pretrained weights, with and without an adapter.
    monkeypatch.chdir(tmp_path)
    more = ["train", text, "--init-from", "run", "--max-steps", 1, "--output-dir"]
    for name, options in {"more": [], "adapter": ["--lora"]}.items():
        code, _, error = run(*more, tmp_path / name, *options)
        assert code == 0, error
        code, _, error = run("generate", tmp_path / name, "To be", "--temperature", 0, "--plain")
        assert code == 0, error
    # From anywhere, an adapter finds the weights that it belongs to.
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tmp_path / "run")


def test_errors_are_in_words_of_the_command_line(text, tmp_path, assert_refused):
    arguments = ["train", text, "--output-dir", tmp_path / "run"]
    for message, *options in [
        (
            "--block-size 2000 exceeds the model's 1024 positions",
            "--preset",
            "gpt2",
            "--block-size",
            2000,
        ),
        ("a smaller --block-size", "--block-size", 50_000),
        ("--n-embd", "--n-embd", 30, "--n-head", 4),
        ("--epochs is --num-train-epochs; give one", "--epochs", 1, "--num-train-epochs", 2),
        (
            "--init-from has weights and --preset has none",
            "--init-from",
            "gpt2",
            "--preset",
            "gpt2",
        ),
        ("'gpt5' is not a folder, not owner/name on the Hub", "--init-from", "gpt5"),
        ("--n-layer cannot change the sizes of pretrained", "--init-from", "gpt2", "--n-layer", 2),
        ("LoRA adapts pretrained weights", "--lora"),
        ("--lora-merge merges the adapter that lora trains", "--lora-merge"),
        ("--tokenizer bpe:x does not name a size", "--tokenizer", "bpe:x"),
        ("--validation 7.0 is not a part of the blocks", "--validation", 7),
        ("--sample-steps -1.0 is not above 0", "--sample-steps", -1),
        ("did you mean gpt3-xl", "--preset", "gpt3-xll"),
        ("--n-layer and --n-head cannot change", "--init-from", "x", "--n-layer", 2, "--n-head", 1),
        ("--num-train-epochs nan is not between 1e-06 and 1,000,000", "--epochs", "nan"),
        ("--per-device-train-batch-size 0 is not between 1 and", "--batch-size", 0),
        ("--learning-rate nan is not between 0 and 1,000", "--lr", "nan"),
        ("--max-steps -7 is not between 1 and", "--max-steps", -7),
        ("error: --max-steps: invalid int value: '1e3'", "--max-steps", "1e3"),
        ("--sample-steps nan is not above 0", "--sample-steps", "nan"),
        ("no token is '語'", "--tokenizer", "char", "--sample-prompt", "語"),
        ("--tokenizer bpe:99999999999 does not name a size", "--tokenizer", "bpe:99999999999"),
        ("--resume-from-checkpoint is not needed", "--resume-from-checkpoint", "x"),
    ]:
        assert_refused(message, *arguments, *options)
        assert not (tmp_path / "run").exists()
    # What is found out later leaves the folder to the next try, too.
    assert_refused("nothing is not supported", *arguments, "--report-to", "nothing")
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.release
@pytest.mark.parametrize("tokenizer", [[], ["--tokenizer", "char"]])
def test_a_killed_training_ends_with_the_same_weights(tokenizer, text, tmp_path, run):
    sizes = ["--n-layer", 1, "--n-head", 2, "--n-embd", 16, "--block-size", 16]
    command = ["train", text, *sizes, *tokenizer, "--max-steps", 60, "--save-steps", 5]
    command += ["--output-dir"]
    assert run(*command, tmp_path / "whole")[0] == 0
    killed = tmp_path / "killed"
    program = [sys.executable, "-m", "hf_scratch_gpt", *map(str, command), str(killed)]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    with subprocess.Popen(program, env=environment, stderr=subprocess.DEVNULL) as process:
        while not (killed / "checkpoint-5" / "trainer_state.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert not (killed / "model.safetensors").exists()
    code, _, error = run(*command, killed)
    assert code == 0, error
    assert "of them done" in error
    wanted, weights = (load_file(tmp_path / x / "model.safetensors") for x in ("whole", "killed"))
    torch.testing.assert_close(weights, wanted, atol=1e-6, rtol=0)


def test_a_preset_is_not_a_folder_of_its_name(text, tmp_path, run, monkeypatch):
    """Such a folder is what `convert 124M gpt2` makes."""
    sizes = ["--n-layer", 1, "--n-head", 2, "--n-embd", 16, "--block-size", 8]
    arguments = ["train", text, *sizes, "--max-steps", 1, "--tokenizer", "char", "--output-dir"]
    assert run(*arguments, tmp_path / "gpt2")[0] == 0
    monkeypatch.chdir(tmp_path)
    for name, options in {"fresh": [], "preset": ["--preset", "gpt2"]}.items():
        code, _, error = run(*arguments, tmp_path / name, *options)
        assert code == 0, error
        assert json.loads((tmp_path / name / "run.json").read_text())["weights"] == "fresh"
    code, _, error = run(
        "train", text, "--init-from", "gpt2", "--max-steps", 1, "--output-dir", "on"
    )
    assert code == 0, error
    assert json.loads((tmp_path / "on" / "run.json").read_text())["weights"] != "fresh"


def test_names_in_errors_become_options():
    said = "hidden_size=30 is not a multiple of num_attention_heads=4; see max_position_embeddings"
    shown = "--n-embd 30 is not a multiple of --n-head 4; see --block-size"
    assert in_options(said) == shown
    path = "/tmp/my_file.txt and 'block_size' of out/block_size are names of the model, lora"
    assert in_options(path) == path
