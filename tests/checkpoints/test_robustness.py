"""No moment of being killed leaves anything but a clean folder."""

import random
import shutil
import time

import pytest
import torch

from hf_scratch_gpt import ScratchGPTForCausalLM

from ..commands import convert
from ..processes import start


@pytest.mark.long
def test_killed_conversions_leave_nothing_and_the_next_one_succeeds(openai_tiny, tmp_path):
    folder, printed = tmp_path / "folder", tmp_path / "printed"
    folder.mkdir()
    command = [str(openai_tiny), str(folder / "out")]
    moments, midway = random.Random(0), 0
    for _ in range(10):
        (process,) = start(printed, 1, convert, command).processes
        while process.is_alive() and not list(folder.glob(".out-*.unfinished")):
            time.sleep(0.002)
        time.sleep(moments.uniform(0.0, 0.2))
        process.kill()
        process.join()
        midway += bool(list(folder.glob(".out-*.unfinished/*")))
        if (folder / "out").exists():  # it was done before the signal came
            model = ScratchGPTForCausalLM.from_pretrained(folder / "out")
            assert torch.isfinite(model.lm_head.weight).all()
            shutil.rmtree(folder / "out")
    assert midway  # or no conversion was killed while it wrote
    assert start(printed, 1, convert, command).wait()[0] == [0], printed.read_text()
    assert [path.name for path in folder.iterdir()] == ["out"]
    ScratchGPTForCausalLM.from_pretrained(folder / "out")
