"""README's commands and Python run as they stand there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_scratch_gpt import ScratchGPTConfig
from hf_scratch_gpt.sizing import count_parameters

from .commands import convert

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with what README's commands read, and room for what they write."""
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "hf_scratch_gpt").symlink_to(ROOT / "hf_scratch_gpt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_blocks_run(openai_tiny, clone):
    assert convert([str(openai_tiny), "out/tiny"]) == 0
    assert len(blocks("python")) == 5
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(block, names)
    assert len(names["texts"]) == 2
    assert (clone / "out/mine/model.safetensors").exists()
    assert names["result"].steps == 5
    assert names["text"]
    assert names["weights"].shape == (2, 4, 10, 10)


@pytest.mark.long
def test_command_lines_run(clone):
    *_, block = blocks("bash")
    assert len(block.splitlines()) == 8
    for line in block.splitlines():
        command = shlex.split(line)
        if command[0] == "hf-scratch-gpt":
            command[:1] = ["python", "-m", "hf_scratch_gpt"]
        elif command[0] == "torchrun":
            command[:1] = ["python", "-m", "torch.distributed.run"]
        command[0] = sys.executable
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=clone, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
    assert (clone / "out/two/loss.png").exists()


def test_the_first_command_is_the_demo():
    assert blocks("bash")[0].splitlines()[-1] == ".venv/bin/hf-scratch-gpt demo"


def test_table_of_presets():
    rows = re.findall(
        r"^\| `([\w-]+)`.*?\| ([\d,]+) \| (\d+), (\d+), (\d+) \|", README, re.MULTILINE
    )
    assert len(rows) == 4
    for name, total, *sizes in rows:
        config = ScratchGPTConfig.from_preset(name)
        assert count_parameters(config).total == int(total.replace(",", ""))
        expected = (config.num_hidden_layers, config.num_attention_heads, config.hidden_size)
        assert tuple(map(int, sizes)) == expected
    for name in ("gpt3-small", "gpt3-175b"):
        assert f"{count_parameters(ScratchGPTConfig.from_preset(name)).total:,}" in README


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
