"""No moment of being killed leaves anything but a clean folder."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hf_scratch_gpt import ScratchGPTForCausalLM

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_killed_conversions_leave_nothing_and_the_next_one_succeeds(openai_tiny, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "conversion.convert_gpt2", str(openai_tiny), str(out)]
    moments, midway = random.Random(0), 0
    for _ in range(10):
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process = subprocess.Popen(command, cwd=ROOT, **quiet)
        # Most of the time goes into importing; the signal is to fall while files are written.
        while process.poll() is None and not list(tmp_path.glob(".out-*.unfinished")):
            time.sleep(0.002)
        time.sleep(moments.uniform(0.0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        midway += bool(list(tmp_path.glob(".out-*.unfinished/*")))
        if out.exists():  # it was done before the signal came
            assert torch.isfinite(ScratchGPTForCausalLM.from_pretrained(out).lm_head.weight).all()
            shutil.rmtree(out)
    assert midway  # or no conversion was killed while it wrote
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    ScratchGPTForCausalLM.from_pretrained(out)
