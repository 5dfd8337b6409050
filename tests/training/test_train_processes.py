"""Training that is killed, and training in several processes, gives the losses of one in peace."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_scratch_gpt.training.run import train

from ..processes import start
from . import train_worker

pytestmark = pytest.mark.long
KILLED = -9


@pytest.fixture(scope="module")
def arguments(openai_tiny, tmp_path_factory):
    """A run of several epochs, with a last batch that its blocks do not fill."""
    folder = tmp_path_factory.mktemp("train")
    text = Path(__file__).parents[2] / "LICENSE"
    (folder / "text.txt").write_text(text.read_text()[:3000])
    place = dict(sources=str(folder / "text.txt"), cache_dir=str(folder / "cache"))
    overrides = dict(n_embd=32, n_layer=2, n_head=2, n_ctx=16, drop_rate=0.0)
    model = dict(tokenizer=str(openai_tiny), overrides=overrides, seed=7, validation=0.1)
    steps = dict(max_steps=30, learning_rate=1e-3, logging_steps=1, eval_steps=6, save_steps=4)
    return {**place, **model, **steps, "report_to": "none", "disable_tqdm": True}


def run(arguments, folder, processes=1, **more):
    """Train in processes; return the status and, if it came so far, what they have written down."""
    history = folder.with_suffix(".json")
    history.unlink(missing_ok=True)
    given = {**arguments, "output_dir": str(folder), "history": str(history), **more}
    output = folder.with_suffix(".output")
    codes, printed = start(output, processes, train_worker.run, given).wait()
    assert "warning" not in printed.lower(), printed
    if set(codes) not in ({0}, {KILLED}):
        pytest.fail(printed)
    return codes[0], json.loads(history.read_text()) if history.exists() else None


def values(history, name):
    return {entry["step"]: entry[name] for entry in history if name in entry}


def assert_same_curve(history, wanted, tolerance, **tolerances):
    for name in ("loss", "eval_loss", "eval_perplexity", "learning_rate", "grad_norm"):
        found = values(history, name)
        assert len(found) == (5 if name.startswith("eval") else 30)
        limit = tolerances.get(name, tolerance)
        assert found == pytest.approx(values(wanted, name), abs=limit, rel=0), name


def test_a_run_killed_again_and_again_has_the_losses_of_one_in_peace(arguments, tmp_path):
    # dropout, so that the random numbers have to go on where they were
    overrides = {**arguments["overrides"], "drop_rate": 0.1}
    arguments = {**arguments, "overrides": overrides}
    whole = train(**arguments, output_dir=tmp_path / "whole")
    folder = tmp_path / "killed"
    for kill, kept in [
        ({"step": 7}, "checkpoint-4"),
        ({"step": 12, "file": "optimizer.pt"}, "checkpoint-8"),
        ({"step": 16, "file": "trainer_state.json"}, "checkpoint-12"),
    ]:
        assert run(arguments, folder, kill=kill) == (KILLED, None)
        assert (folder / kept).exists()
        assert not (folder / "model.safetensors").exists()
    assert (folder / "checkpoint-16").exists(), "half of it"
    status, found = run(arguments, folder)
    assert (status, found["from"], found["steps"]) == (0, 12, 30)
    assert_same_curve(found["history"], whole.history, 1e-6)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "killed")]
    for wanted, weights in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(weights, wanted, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory):
    """The same training in one process."""
    folder = tmp_path_factory.mktemp("alone")
    return train(**arguments, output_dir=folder / "run", per_device_train_batch_size=8)


def test_two_processes_have_the_losses_of_one_and_stop_together(arguments, alone, tmp_path):
    halves = dict(per_device_train_batch_size=4, per_device_eval_batch_size=3)
    folder = tmp_path / "run"
    interrupt = {"step": 14, "rank": 1}
    _, found = run(arguments, folder, processes=2, interrupt=interrupt, **halves)
    assert found["interrupted"]
    assert found["steps"] == 14
    assert (folder / "checkpoint-14").exists()
    assert not (folder / "model.safetensors").exists()
    _, found = run(arguments, folder, processes=2, **halves)
    assert (found["from"], found["steps"], found["interrupted"]) == (14, 30, False)
    assert_same_curve(found["history"], alone.history, 1e-4, eval_perplexity=1e-2)


def test_sharded_weights_give_the_losses_of_whole_ones(arguments, alone, tmp_path):
    folder = tmp_path / "run"
    sharded = dict(fsdp=True, use_cpu=False, dataloader_pin_memory=False)
    halves = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    _, found = run(arguments, folder, processes=2, sample_prompt="The", **sharded, **halves)
    assert_same_curve(found["history"], alone.history, 1e-4, eval_perplexity=1e-2)
    assert (folder / "checkpoint-30" / "pytorch_model_fsdp.bin").exists(), "it was not sharded"
    # the model's own code, not that of torch which the class of a sharded model comes from
    assert (folder / "modeling_scratch_gpt.py").exists()
    assert not list(folder.glob("_fsdp*"))
    models = [AutoModelForCausalLM.from_pretrained(place) for place in (folder, alone.folder)]
    for weights, wanted in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(weights, wanted, atol=1e-5, rtol=0)
