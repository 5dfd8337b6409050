"""The commands that write, train and demonstrate, as a user calls them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

import hf_scratch_gpt
from hf_scratch_gpt import ScratchGPTForCausalLM, ScratchGPTTokenizer
from hf_scratch_gpt.cli import demo_run as demo

from ..models import random_model
from ..test_readme import assert_printed, blocks


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
    assert run("clear-cache", file.parent)[1] == f"{file.parent} holds no token ids\n"


def test_train_refuses_bad_choices(model_folder, tmp_path, assert_refused):
    (tmp_path / "binary.txt").write_bytes(b"abc\0def")
    arguments = ["train", tmp_path / "binary.txt", "--output-dir", tmp_path / "run", "--model"]
    message = "binary.txt is not UTF-8 text: byte 3"
    assert_refused(message, *arguments, model_folder)
    assert not (tmp_path / "run").exists()
    assert_refused("did you mean gpt2-medium", *arguments, "gpt2-mediun")
    unknown = [*arguments, model_folder, "--lerning-rate", "1"]
    assert_refused("did you mean --learning-rate", *unknown)


@pytest.mark.release
def test_demo_makes_a_model_that_loads_without_the_package(tmp_path, monkeypatch, run):
    """A short one."""
    few = {"max_steps": 6, "eval_steps": 3, "save_steps": 6}
    monkeypatch.setattr(demo, "STEPS", 6)
    monkeypatch.setattr(demo, "TRAINING", demo.TRAINING | few)
    code, out, error = run("demo", "--out", tmp_path / "demo")
    assert code == 0, error
    difference = re.search(r"differ from those of\s+OpenAI's own code by (\S+) at most", out)
    assert float(difference[1]) <= 1e-5
    order = ["After 0 steps it writes", "After 3 steps it writes", "for the best bigram model"]
    order += [
        "Loaded again, it writes",
        str(tmp_path / "demo" / "model" / "loss.png"),
        " generate ",
    ]
    places = [out.index(part) for part in [*order, "from transformers import"]]
    assert places == sorted(places)
    assert out.count(demo.PROMPT) >= 4
    lines = out[places[-1] :]
    # A process that cannot find the package.
    code = f"import sys\nsys.modules['hf_scratch_gpt'] = None\n{lines}"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(demo.PROMPT)
    generate = next(line for line in out.splitlines() if " generate " in line)
    done = subprocess.run(generate, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith(demo.PROMPT), done.stderr
    code, out, _ = run("demo", "--out", tmp_path / "demo")
    assert code == 0
    assert "It was trained before" in out


@pytest.mark.release
def test_the_whole_demo_learns_more_than_pairs_of_tokens(tmp_path, run):
    code, out, error = run("demo", "--out", tmp_path)
    assert code == 0, error
    losses = re.search(r"Validation loss (\S+) nats per token; (\S+) for the best bigram", out)
    assert float(losses[1]) <= float(losses[2]) - 0.35
    begin = " ".join(demo.PROMPT.split()[:-1])  # what follows depends on the processor
    (picture,) = blocks("text")
    lines = [begin if line.startswith(begin) else line for line in picture.splitlines()]
    assert_printed(lines, out)
    state = json.loads((tmp_path / "model" / "trainer_state.json").read_text())
    assert sum("eval_loss" in entry for entry in state["log_history"]) >= 10


def test_demo_begins_by_asking_for_what_it_needs(tmp_path, monkeypatch, run):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out, error = run("demo", "--out", tmp_path / "demo")
    assert (code, out) == (1, "")
    assert "pip install 'hf_scratch_gpt[train]'" in error
    assert not (tmp_path / "demo").exists()


def test_a_demo_that_is_stopped_ends_as_ctrl_c_does(monkeypatch, run):
    monkeypatch.setattr(demo, "run_demo", lambda *_: False)
    assert run("demo")[0] == 130


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
