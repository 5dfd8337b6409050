"""Tensor and pipeline parallelism and FSDP on two processes give the results of one."""

from pathlib import Path

import pytest
import torch

from hf_scratch_gpt import ScratchGPTForCausalLM

from ..models import random_ids, random_model
from ..processes import start
from .parallel_worker import compare_all

KINDS = ["tp", "pp", "fsdp"]


def save_expected(folder: Path, is_tied: bool) -> Path:
    """Save a model and what one process makes of a left-padded batch."""
    torch.manual_seed(0)
    # an odd vocabulary, as GPT-2's is, and five layers, so that two stages differ
    model = random_model(ScratchGPTForCausalLM, tie_word_embeddings=is_tied, num_hidden_layers=5)
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
def test_two_processes_agree_with_one(tmp_path):
    folders = [save_expected(tmp_path / name, name == "tied") for name in ("tied", "separate")]
    codes, output = start(tmp_path / "output", 2, compare_all, KINDS, folders).wait()
    assert codes == [0, 0], output
    for folder in folders:
        for kind in KINDS:
            assert output.count(f"{folder.name} {kind} agrees") == 2, output
    assert "warning" not in output.lower(), output
    for folder in folders:
        model = ScratchGPTForCausalLM.from_pretrained(folder / "model")
        for kind in ("tp", "fsdp"):
            again = ScratchGPTForCausalLM.from_pretrained(folder / kind)
            for name, parameter in model.named_parameters():
                assert torch.equal(again.get_parameter(name), parameter), (kind, name)
