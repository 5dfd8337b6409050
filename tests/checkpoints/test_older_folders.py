"""Folders that earlier versions of the package saved still load, and say how to refresh their code.

`fixtures/saved-by-0.1.0` is `openai-tiny` converted by version 0.1.0. Its code is left out: beside
the package it is not read.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_scratch_gpt import ScratchGPTConfig, __version__
from hf_scratch_gpt.cli.size_table import find_config

from ..commands import export as export
from ..conftest import FIXTURES
from ..model.test_remote_code import MODEL, load_everything

OLD = FIXTURES / "saved-by-0.1.0"


@pytest.fixture
def folder(tmp_path):
    """A copy, since each folder is warned of once in a process."""
    return shutil.copytree(OLD, tmp_path / "old")


@torch.no_grad()
def test_it_gives_openais_logits_and_generates_with_a_cache(folder, openai_tiny, logged_warnings):
    model = AutoModelForCausalLM.from_pretrained(folder)
    reference = np.load(openai_tiny / "reference_logits.npz")
    ids = torch.tensor(reference["input_ids"])
    expected = torch.tensor(reference["logits"])
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)
    prompt = ids[:1, :6]
    generated, without = (
        model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert generated.tolist() == without.tolist()
    [warning] = logged_warnings
    assert warning.startswith(f"{folder} holds code of hf_scratch_gpt 0.1.0, older than this")
    assert __version__ in warning
    assert "save_pretrained" in warning


def test_refreshed_it_says_nothing(folder, logged_warnings):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert len(logged_warnings) == 1
    assert json.loads((folder / "config.json").read_text())["code_version"] == __version__
    AutoModelForCausalLM.from_pretrained(folder)
    assert len(logged_warnings) == 1
    for file in MODEL.glob("*_scratch_gpt.py"):
        assert (folder / file.name).read_text() == file.read_text()


@pytest.mark.long
def test_refreshed_its_code_runs_alone(folder, tmp_path, logged_warnings):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert load_everything(folder, tmp_path / "again").startswith("The cat")


@pytest.mark.parametrize("command", ["info", "export"])
def test_commands_say_it_too(folder, tmp_path, command, logged_warnings):
    if command == "info":
        find_config(str(folder))
    else:
        assert export([str(folder), str(tmp_path / "exported")]) == 0
    assert [warning[: len(str(folder))] for warning in logged_warnings] == [str(folder)]


def test_a_configuration_that_was_never_saved_is_as_new_as_the_package():
    assert ScratchGPTConfig().code_version == __version__
    assert ScratchGPTConfig.from_dict({"n_embd": 64, "n_head": 4}).code_version == __version__
