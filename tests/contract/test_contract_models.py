"""The contract tests pass on our model, and fail elsewhere exactly where it falls short."""

import re
import subprocess
import sys

import pytest

from .contracts import run_contract, run_pytest
from .shortfalls import SHORTFALLS

LLAMA = ("--model-class", "transformers:LlamaForCausalLM")
NEEDS_AN_ACCELERATOR = "test_padding_and_caches.py::test_steps_with_a_cache_equal_one_pass[offload"


@pytest.mark.release
def test_ours_passes(tmp_path, logged_warnings):
    reports = run_contract(tmp_path, "hf_scratch_gpt:ScratchGPTForCausalLM")
    assert not reports.failed
    assert len(reports.passed) > 50
    assert all(name.startswith(NEEDS_AN_ACCELERATOR) for name in reports.skipped)


@pytest.mark.release
@pytest.mark.parametrize("name", SHORTFALLS)
def test_others_fail_where_it_is_known(name, tmp_path, logged_warnings):
    reports = run_contract(tmp_path, f"transformers:{name}")
    assert reports.failed.keys() == SHORTFALLS[name].keys()
    assert len(reports.passed) > 50


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "give --model-class package.module:Class"),
        (("--model-class", "no_such_package:Model"), "No module named 'no_such_package'; give it"),
        (("--model-class", "torch:Tensor"), "is not a subclass of transformers' PreTrainedModel"),
        ((*LLAMA, "--model-config", '{"hidden_size": 7}'), "LlamaConfig refuses the tiny sizes: "),
    ],
)
def test_what_is_missing_is_said(given, message, tmp_path, capsys):
    code, _ = run_pytest(tmp_path, *given)
    assert code == pytest.ExitCode.USAGE_ERROR
    error = capsys.readouterr().err.strip()
    assert re.fullmatch(f"ERROR: .*{message}.*", error), error


@pytest.mark.release
def test_the_command_of_the_guide(tmp_path):
    """As it is written there, from a folder that has nothing to do with the package."""
    command = [sys.executable, "-m", "pytest", "--pyargs", "hf_scratch_gpt.contract"]
    which = ["-k", "next_token or fourth"]
    run = subprocess.run([*command, *LLAMA, *which], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 passed" in run.stdout
