"""Tensor and pipeline parallelism and FSDP on two processes give the results of one."""

import os
import subprocess
import sys

import pytest
import torch

from hf_scratch_gpt import ScratchGPTForCausalLM

from ..models import random_ids, random_model

TIED = [True, False]


@pytest.fixture(scope="module", params=TIED, ids=["tied", "untied"])
def expected(request, tmp_path_factory):
    """A folder with a model and what one process makes of a left-padded batch."""
    folder = tmp_path_factory.mktemp("parallel")
    torch.manual_seed(0)
    # an odd vocabulary, as GPT-2's is, and five layers, so that two stages differ
    model = random_model(
        ScratchGPTForCausalLM, tie_word_embeddings=request.param, num_hidden_layers=5
    )
    model.save_pretrained(folder / "model")
    inputs = {"input_ids": random_ids(2, 10), "attention_mask": torch.ones(2, 10).long()}
    inputs["attention_mask"][1, :4] = 0
    with torch.no_grad():
        logits = model(**inputs).logits
    options = dict(max_new_tokens=8, do_sample=False)
    options |= dict(output_logits=True, return_dict_in_generate=True)
    generated = model.generate(**inputs, **options)
    results = {"logits": logits, "sequences": generated.sequences, "options": options}
    results["step_logits"] = torch.stack(generated.logits)
    torch.save({**inputs, **results}, folder / "expected.pt")
    return folder


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tp", "pp", "fsdp"])
def test_two_processes_agree_with_one(kind, expected):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.run(
        [*command, "--nproc_per_node=2", "-m", "tests.model.parallel_worker", kind, str(expected)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(f"{kind} agrees") == 2
    assert "warning" not in run.stderr.lower(), run.stderr
    if kind != "pp":
        model, again = (
            ScratchGPTForCausalLM.from_pretrained(expected / name) for name in ("model", "again")
        )
        for name, parameter in model.named_parameters():
            assert torch.equal(again.get_parameter(name), parameter), name
