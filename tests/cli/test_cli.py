"""The commands that write, train and demonstrate, as a user calls them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

import hf_scratch_gpt
from hf_scratch_gpt import ScratchGPTForCausalLM, ScratchGPTTokenizer
from hf_scratch_gpt.cli import demo_run as demo

from ..models import random_model


@pytest.fixture(scope="module")
def model_folder(openai_tiny, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("cli") / "model"
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 399)
    sizes = dict(vocab_size=400, max_position_embeddings=16)
    random_model(ScratchGPTForCausalLM, **sizes, **tokens).save_pretrained(folder)
    ScratchGPTTokenizer.from_pretrained(openai_tiny).save_pretrained(folder)
    return folder


def test_generate_writes_the_same_text_from_the_same_seed(model_folder, run):
    arguments = ("generate", model_folder, "Hello", "--max-new-tokens", 40, "--seed")
    texts = [run(*arguments, *more) for more in ([1], [1], [1, "--fast"], [2])]
    assert [code for code, *_ in texts] == [0, 0, 0, 0]
    assert texts[0][1] == texts[1][1] == texts[2][1] != texts[3][1]
    assert texts[0][1].startswith("Hello")  # 40 tokens, past the window of 16
    code, out, _ = run("generate", model_folder, "Hello", "--samples", 3)
    assert (code, out.count("Hello"), "2 of 3" in out) == (0, 3, True)


def test_train_with_flags_of_the_trainer(model_folder, tmp_path, run, assert_refused):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 40)
    arguments = ["train", tmp_path / "text.txt", "--output-dir", tmp_path / "run"]
    arguments += ["--model", model_folder, "--block-size", 16, "--max-steps", 4]
    arguments += ["--learning-rate", "1e-3", "--sample-prompt", "To be", "--use-cpu"]
    code, out, error = run(*arguments)
    assert code == 0, error
    assert "validation loss" in error
    kept = next(line for line in error.splitlines() if line.startswith("Token ids: "))
    assert "step 4 writes: To be" in error
    assert out.startswith("4 steps, loss")
    assert (tmp_path / "run" / "loss.png").is_file()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.vocab_size == 400
    rates = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (rates["learning_rate"], rates["max_steps"]) == (1e-3, 4)
    code, out, _ = run(*arguments)
    assert code == 0
    assert "as it was before" in out
    assert_refused("holds another run (--learning-rate", *arguments, "--learning-rate", "1")
    file = Path(kept.partition(" MB in ")[2].partition(", kept")[0])
    assert file.is_file()
    code, out, _ = run("clear-cache", file.parent)
    assert (code, file.exists()) == (0, False)
    assert re.fullmatch(rf"removed \d+\.\d MB from {re.escape(str(file.parent))}\n", out)


def test_train_refuses_bad_choices(model_folder, tmp_path, assert_refused):
    (tmp_path / "binary.txt").write_bytes(b"abc\0def")
    arguments = ["train", tmp_path / "binary.txt", "--output-dir", tmp_path / "run", "--model"]
    message = "binary.txt is not UTF-8 text: byte 3"
    assert_refused(message, *arguments, model_folder)
    assert not (tmp_path / "run").exists()
    assert_refused("did you mean gpt2-medium", *arguments, "gpt2-mediun")
    unknown = [*arguments, model_folder, "--lerning-rate", "1"]
    assert_refused("did you mean --learning-rate", *unknown)


@pytest.mark.long
def test_demo_makes_a_model_that_loads_without_the_package(tmp_path, monkeypatch, run):
    """A short one; in full it takes a minute."""
    monkeypatch.setattr(
        demo, "TRAINING", {**demo.TRAINING, "max_steps": 6, "eval_steps": 3, "save_steps": 6}
    )
    code, out, error = run("demo", "--out", tmp_path / "demo")
    assert code == 0, error
    assert "for the best bigram model" in out
    assert out.index("It writes") < out.index(demo.PROMPT) < out.index("from transformers import")
    lines = out[out.index("from transformers import") :]
    # A process that cannot find the package.
    code = f"import sys\nsys.modules['hf_scratch_gpt'] = None\n{lines}"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(demo.PROMPT)
    code, out, _ = run("demo", "--out", tmp_path / "demo")
    assert code == 0
    assert "It was trained before" in out


def test_bigram_loss_is_that_of_its_formula():
    training, validation = np.array([[0, 1, 0, 1], [0, 2, 0, 1]]), np.array([[0, 1, 0, 2]])
    frequency = [(4 + 1) / 11, (3 + 1) / 11, (1 + 1) / 11]  # of 8 tokens, one more each
    pairs = [(3, 4, 1), (1, 1, 0), (1, 4, 2)]  # how often b follows a, how often any does, b
    losses = []
    for m in (1, 2, 5, 10, 20, 50, 100, 200):
        p = [(count + m * frequency[b]) / (followed + m) for count, followed, b in pairs]
        losses.append(-sum(np.log(p)) / 3)
    assert demo.bigram_loss(training, validation, 3) == pytest.approx(min(losses), abs=1e-12)


def test_convert_verify_and_export_are_commands_too(openai_tiny, tmp_path, run):
    out, gpt2 = tmp_path / "out", tmp_path / "gpt2"
    code, printed, _ = run("convert", openai_tiny, out, "--dtype", "float32")
    assert code == 0
    assert "logits differ by" in printed
    assert run("verify", openai_tiny, out)[0] == run("export", out, gpt2)[0] == 0
    ids = torch.arange(10)[None]
    ours, theirs = ScratchGPTForCausalLM, GPT2LMHeadModel
    logits = [kind.from_pretrained(at)(ids).logits for kind, at in ((ours, out), (theirs, gpt2))]
    torch.testing.assert_close(*logits)
    code, _, error = run("convert", openai_tiny, out)
    assert code == 2
    assert "pass --overwrite" in error
    code, printed, _ = run("convert", "--help")
    assert code == 0
    assert "--activation" in printed
    assert run("convert")[0] == 2


@pytest.mark.parametrize("command", ["generate", "inspect", "eval", "serve"])
def test_a_folder_that_describes_more_than_it_holds_is_refused(
    command, model_folder, tmp_path, assert_refused
):
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(model_folder, folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 9}))
    text.write_text("Hello")
    arguments = {"generate": ["Hello"], "inspect": ["Hello"], "eval": [text], "serve": []}
    assert_refused("config.json describes", command, folder, *arguments[command])


def test_version(run):
    assert run("--version")[:2] == (0, f"{hf_scratch_gpt.__version__}\n")
