"""README's Python runs as it stands there, on the model that README's first command makes."""

import re
from pathlib import Path

from conversion.convert_gpt2 import main as convert

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_python_blocks_run(openai_tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert convert([str(openai_tiny), "out/tiny"]) == 0
    assert len(blocks("python")) == 3
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(block, names)
    assert len(names["texts"]) == 2
    assert (tmp_path / "out/mine/model.safetensors").exists()
    assert names["weights"].shape == (2, 4, 10, 10)


def test_python_of_the_first_command_runs(openai_tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert convert([str(openai_tiny), "out/tiny"]) == 0
    capsys.readouterr()
    first, _ = blocks("bash")
    exec(re.search(r'-c "\n(.*)"', first, flags=re.DOTALL)[1], {})
    assert capsys.readouterr().out.startswith("Hello, world")


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
