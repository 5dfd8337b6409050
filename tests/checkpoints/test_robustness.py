"""No input, and no moment of being killed, leaves anything but a clean error and a clean folder."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_scratch_gpt import ScratchGPTForCausalLM
from hf_scratch_gpt.checkpoints.assemble import plan
from hf_scratch_gpt.checkpoints.openai_release import read_openai_release
from hf_scratch_gpt.checkpoints.tensor_bundle import read_table

from .releases import table

NAMES = ["checkpoint", "hparams.json", "encoder.json", "vocab.bpe", "model.ckpt.index"]
NAMES += ["model.ckpt.index", "model.ckpt.data-00000-of-00001"]
ROOT = Path(__file__).parents[2]


KINDS = ["flip", "cut", "insert", "delete", "repeat", "replace"]


@st.composite
def mutations(draw):
    """A file of the release, and what to do to its bytes."""
    name, kind = draw(st.sampled_from(NAMES)), draw(st.sampled_from(KINDS))
    return name, kind, draw(st.floats(0, 1)), draw(st.binary(min_size=1, max_size=12))


def mutate(data, kind, where, content):
    place = int(where * max(0, len(data) - 1))
    start, end = data[:place], data[place:]
    return (
        start
        + {
            "flip": bytes([byte ^ (content[0] or 1) for byte in end[:1]]) + end[1:],
            "cut": b"",
            "insert": content + end,
            "delete": end[len(content) :],
            "repeat": end[:200] + end,
            "replace": content + end[len(content) :],
        }[kind]
    )


def memory(kind):
    """Kilobytes of this process: VmRSS now, VmHWM at its peak."""
    return int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0])


def start_of_peak():
    """Let the peak begin at what is in memory now, which is returned.

    The peak of the whole process would hide every growth below what an earlier test took.
    """
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def read_all(release):
    for tensor in plan(read_openai_release(release)).values():
        assert tensor.read().shape == tensor.shape


@pytest.fixture(scope="module")
def workplace(openai_tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutated") / "release"
    shutil.copytree(openai_tiny, folder)
    return folder


REPEATABLE = dict(derandomize=True, database=None)
measures_memory = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="measures by Linux's /proc"
)


@pytest.mark.long
@measures_memory
@settings(max_examples=2000, deadline=5000, suppress_health_check=list(HealthCheck), **REPEATABLE)
@given(mutation=mutations())
def test_mutated_releases_convert_or_are_refused_cleanly(mutation, workplace, openai_tiny):
    name, kind, where, content = mutation
    original = (openai_tiny / name).read_bytes()
    (workplace / name).write_bytes(mutate(original, kind, where, content))
    before = start_of_peak()
    try:
        read_all(str(workplace))
    except ValueError:
        pass
    finally:
        (workplace / name).write_bytes(original)
    assert memory("VmHWM") - before < 200_000  # kilobytes


@pytest.mark.long
@measures_memory
def test_mutated_indexes_with_right_checksums_are_refused_cleanly(workplace, openai_tiny):
    path, chance = workplace / "model.ckpt.index", random.Random(0)
    pairs = list(read_table((openai_tiny / "model.ckpt.index").read_bytes()))
    contents = [b"\xff" * 8 + b"\x7f", chance.randbytes(3), b"\0"]
    before, refused, right = start_of_peak(), 0, 0
    try:
        for _ in range(500):
            spoilt, place = list(pairs), chance.randrange(len(pairs))
            change = (chance.choice(KINDS), chance.random(), chance.choice(contents))
            spoilt[place] = (pairs[place][0], mutate(pairs[place][1], *change))
            path.write_bytes(table(spoilt))
            try:
                read_all(str(workplace))
                right += 1
            except ValueError as error:
                refused += str(workplace) in str(error)
    finally:
        path.write_bytes((openai_tiny / path.name).read_bytes())
    assert refused > 400
    assert refused + right == 500  # every error names the file
    assert memory("VmHWM") - before < 200_000  # kilobytes


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
