"""`hf-scratch-gpt with`: tools of others, with the classes registered in them."""

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest

ASK = (
    "import json, sys; knows = 'hf_scratch_gpt' in sys.modules; "
    "print(json.dumps([sys.argv, knows, hasattr(sys, 'customized')]))"
)
# It tells of itself, of a Python that it starts, and of one that multiprocessing starts.
TOOL = f"""\
import multiprocessing, subprocess, sys

def ask():
    exec({ASK!r})

if __name__ == "__main__":
    ask()
    sys.stdout.flush()
    subprocess.run([sys.executable, "-c", {ASK!r}, "other"], check=True)
    process = multiprocessing.get_context("spawn").Process(target=ask)
    process.start()
    process.join()
    if sys.argv[1:] == ["fails"]:
        raise ValueError("its own error")
    sys.exit(len(sys.argv))
"""


@pytest.fixture
def tool(tmp_path, monkeypatch):
    (tmp_path / "sometool.py").write_text(TOOL)
    monkeypatch.chdir(tmp_path)
    return "sometool"


@pytest.fixture
def _same_paths(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))


def start(*arguments: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    root = str(metadata.distribution("hf_scratch_gpt").locate_file(""))
    paths = [path for path in (os.environ.get("PYTHONPATH"), root) if path]
    return subprocess.run(
        [sys.executable, *before, "-m", "hf_scratch_gpt", "with", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


@pytest.mark.parametrize("name", ["sometool", "sometool.py"])
def test_a_tool_and_all_that_it_starts_know_the_classes(name, tool, tmp_path):
    done = start(name, "--version", "--help")
    assert done.returncode == 3, done.stderr  # what stands behind it is all its own
    first, *others = [json.loads(line) for line in done.stdout.splitlines()]
    path = "sometool.py" if name.endswith(".py") else str(tmp_path / "sometool.py")
    assert first == [[path, "--version", "--help"], True, False]
    assert [knows for _, knows, _ in others] == [True, True]
    assert done.stderr == ""


def test_another_customization_of_the_site_is_read_too(tool, tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import sys\nsys.customized = True")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    done = start(tool)
    assert done.stdout.count("true, true]") == 3, done.stderr  # itself, and the two it starts


def test_an_error_of_the_tool_is_shown_as_its_own(tool):
    done = start(tool, "fails")
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: its own error\n")
    assert "hf_scratch_gpt" not in done.stderr


@pytest.mark.usefixtures("_same_paths")
def test_commands_of_packages_run_by_their_entry_points(run, tmp_path):
    (tmp_path / "test_it.py").write_text("def test_it():\n    assert False\n")
    code, out, _ = run("with", "pytest", "-q", "-p", "no:cacheprovider", tmp_path / "test_it.py")
    assert code == 1
    assert "1 failed" in out


@pytest.mark.usefixtures("_same_paths")
@pytest.mark.parametrize("name", ["no_such_tool", "no.such", "", ".x", "folder"])
def test_a_tool_that_is_not_there_is_named(name, assert_refused, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert_refused(f"{name!r} is not a command, a module or a file", "with", name, "--help")
    remedy = "pip install no_such_tool" if name == "no_such_tool" else "give another"
    assert_refused(remedy, "with", name)


@pytest.mark.long
def test_below_a_launcher(tool):
    """`accelerate launch -m hf_scratch_gpt with TOOL`."""
    command = "-m accelerate.commands.launch --cpu --num_processes 1 --num_machines 1 "
    command += "--mixed_precision no --dynamo_backend no -m hf_scratch_gpt with"
    done = subprocess.run(
        [sys.executable, *command.split(), tool, "--x"], capture_output=True, text=True
    )
    assert done.stdout.count("true, false]") == 3, done.stderr
    assert "exit status 2" in done.stderr  # the tool's own exit code
