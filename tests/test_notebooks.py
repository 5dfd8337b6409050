"""The notebooks run in a fresh kernel without a warning and show what is stored in them.

After a change of a notebook, or of code that it shows, `python -m tests.test_notebooks` runs both
(or those that are named, such as `tour`) and stores what they show. Look at them before the commit.
"""

import inspect
import os
import re
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

import hf_scratch_gpt
from hf_scratch_gpt.model import blocks_scratch_gpt as blocks

DOCS = Path(__file__).parent.parent / "docs"
NAMES = ("tour", "finetune")
# What a cell with this tag prints may differ from processor to processor; its asserts do not.
VARIES = "varies"
# As on a machine of one's own, without a network.
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(DOCS.parent),
    # tqdm would like ipywidgets, which Jupyter brings.
    "PYTHONWARNINGS": "ignore:IProgress not found",
}
LARGEST = 400_000  # bytes


def stored(name: str) -> NotebookNode:
    return nbformat.read(DOCS / f"{name}.ipynb", as_version=4)


def executed(name: str) -> NotebookNode:
    """The notebook as it is after a run in a kernel of its own, started in its folder."""
    notebook = stored(name)
    NotebookClient(
        notebook,
        timeout=600,  # seconds for a cell
        kernel_name="python3",
        coalesce_streams=True,  # a text may come in pieces
        record_timing=False,
        resources={"metadata": {"path": str(DOCS)}},
    ).execute(env={**os.environ, **SETTINGS})
    notebook.metadata.language_info = {"name": "python"}  # without the version of this Python
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell: NotebookNode) -> list[str]:
    """What a cell shows as text."""
    texts = []
    for output in cell.outputs:
        if output.output_type == "stream":
            texts.append(f"{output.name}: {output.text}")
        else:
            texts += [
                data for kind, data in sorted(output.data.items()) if kind.startswith("text/")
            ]
    return texts


@pytest.mark.release
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_without_a_warning_and_shows_what_is_stored(name):
    for before, after in zip(code_cells(stored(name)), code_cells(executed(name)), strict=True):
        assert not [text for text in shown(after) if text.startswith("stderr")], after.source
        if VARIES not in after.metadata.get("tags", []):
            assert shown(after) == shown(before), after.source


@pytest.mark.parametrize("name", NAMES)
def test_it_is_stored_whole_small_and_without_traces_of_a_machine(name):
    assert (DOCS / f"{name}.ipynb").stat().st_size < LARGEST
    notebook = stored(name)
    nbformat.validate(notebook)
    numbers = [cell.execution_count for cell in code_cells(notebook)]
    assert numbers == [*range(1, len(numbers) + 1)]  # run once, from top to bottom
    for cell in code_cells(notebook):
        assert set(cell.metadata) <= {"tags"}  # no times
        assert not re.search(r"/(home|root|tmp|Users)/|site-packages", "\n".join(shown(cell)))


def test_code_that_the_tour_shows_is_that_of_the_package():
    count = 0
    for cell in code_cells(stored("tour")):
        if name := re.fullmatch(r"source\(([\w.]+)\)", cell.source):
            first, *rest = name[1].split(".")
            thing = getattr(blocks if hasattr(blocks, first) else hf_scratch_gpt, first)
            for attribute in rest:
                thing = getattr(thing, attribute)
            code = textwrap.dedent(inspect.getsource(thing))
            told = "python -m tests.test_notebooks tour shows it anew"
            assert cell.outputs[0].data["text/markdown"] == f"```python\n{code}\n```", told
            count += 1
    assert count > 5


if __name__ == "__main__":
    for notebook_name in sys.argv[1:] or NAMES:
        text = nbformat.writes(executed(notebook_name), indent=1)
        (DOCS / f"{notebook_name}.ipynb").write_text(text + "\n", encoding="utf-8")
