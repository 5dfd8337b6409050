"""`new`: a package of one's own that works at once."""

import subprocess
import sys

import pytest

from hf_scratch_gpt.scaffold import class_name, new_package


def test_names_of_classes():
    names = {"my_gpt": "MyGPT", "tiny_llm2": "TinyLlm2", "gpt_x": "GPTX"}
    assert {name: class_name(name) for name in names} == names


@pytest.mark.parametrize("name", ["My-GPT", "gpt_", "2gpt", "class", "../x", "", "gpt2", "numpy"])
def test_names_that_cannot_be_taken(name, tmp_path):
    with pytest.raises(ValueError, match=r"cannot be the name of a package|is taken"):
        new_package(name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_is_not_replaced_unasked(tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        new_package("my_gpt", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_nothing_of_this_package_is_left_in_it(tmp_path):
    folder = new_package("my_gpt", tmp_path / "out")
    files = {path: path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert not any("scratch_gpt" in path.name for path in files)
    left = [path.name for path, text in files.items() if "ScratchGPT" in text]
    assert left == []
    with_name = [path.name for path, text in files.items() if "scratch_gpt" in text]
    assert with_name == ["README.md"], "which says how to run the contract tests"


WITHOUT_THIS_PACKAGE = """
import sys
sys.modules["hf_scratch_gpt"] = None  # an import of it raises
import pytest
sys.exit(pytest.main(["-q", "-p", "no:xdist", "-p", "no:cacheprovider"]))
"""


@pytest.mark.long
def test_its_own_tests_pass(tmp_path):
    """They train it, save it, and load it in a process that has the saved code alone."""
    folder = new_package("my_gpt", tmp_path / "out")
    command = [sys.executable, "-W", "error::FutureWarning", "-c", WITHOUT_THIS_PACKAGE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout
