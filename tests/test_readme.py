"""README's commands and Python run as they stand there, and print what it shows.

The picture above them is compared by the test of the whole demo, in cli/test_cli.py.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hf_scratch_gpt import ScratchGPTConfig
from hf_scratch_gpt.cli import main
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


def parts(block: str) -> list[tuple[str, list[str]]]:
    """The commands of a block, each with the lines of its output that are shown below it."""
    found: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        if line.startswith("# "):
            found[-1][1].append(line.removeprefix("# "))
        else:
            found.append((line, []))
    return found


def is_like(shown: str, printed: str) -> bool:
    """Whether a word is the same; figures with a point depend on the processor and on README."""
    if shown == printed:
        return True
    figures = [re.fullmatch(r"(\d+\.\d+(e-\d+)?),?", word) for word in (shown, printed)]
    return all(figures) and float(figures[0][1]) == pytest.approx(float(figures[1][1]), rel=0.5)


def assert_printed(shown: list[str], output: str) -> None:
    """Each line that is shown is the beginning of one of `output`, in the same order."""
    lines = iter(output.splitlines())
    for line in shown:
        words = line.split()
        starts = (printed.split()[: len(words)] for printed in lines)
        assert any(
            len(start) == len(words) and all(map(is_like, words, start)) for start in starts
        ), line


@pytest.mark.long
def test_commands_print_what_is_shown(clone, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    *_, block = blocks("bash")
    *lines, last = parts(block)
    assert len(lines) == 7
    assert last[0].startswith("torchrun ")
    for line, shown in lines:
        name, *arguments = shlex.split(line)
        assert name == "hf-scratch-gpt"
        with pytest.raises(SystemExit) as end:
            main(arguments)
        printed = capsys.readouterr()
        assert not end.value.code, f"{line}: {printed.err}"
        assert len(shown) == 1
        assert_printed(shown, printed.out)


@pytest.mark.release
def test_two_processes_print_what_is_shown(clone, openai_tiny):
    assert convert([str(openai_tiny), "out/tiny"]) == 0
    line, shown = parts(blocks("bash")[-1])[-1]
    _, *arguments = shlex.split(line)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_printed(shown, done.stdout)


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
    """Each begins with the repository's address, as package indexes show README too, if it has one.

    Until pyproject.toml gives one, they are relative.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    address = project.get("urls", {}).get("Repository")
    base = f"{address}/blob/main/" if address else ""
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 5
    for link in links:
        assert link.startswith(base)
        assert (ROOT / link.removeprefix(base)).exists(), link


def test_it_is_short():
    assert len(README.splitlines()) <= 150
