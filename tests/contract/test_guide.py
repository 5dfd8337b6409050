"""The guide for plugin authors names tests that exist, and all that catch a trap."""

import re
from pathlib import Path

from .gated import PROMISES
from .test_contract_traps import TRAPS

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "plugin.md").read_text(encoding="utf-8")


def rows() -> list[str]:
    (table,) = re.findall(r"^\| Symptom .*?\n\n", GUIDE, re.DOTALL | re.MULTILINE)
    return table.strip().splitlines()[2:]


def test_every_trap_has_a_test_that_exists():
    folders = ("tests", "hf_scratch_gpt/contract")
    files = [path for folder in folders for path in (ROOT / folder).rglob("test_*.py")]
    there = {name for path in files for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert len(rows()) > 30
    for row in rows():
        *_, cell = row.strip("| ").split(" | ")
        names = re.findall(r"`(test_\w+)`", cell)
        assert names or cell == "the same", row
        assert set(names) <= there, row


def test_no_trap_is_left_out():
    """Some break what is no trap but the point of the matter, which needs no warning."""
    plain = {"test_embeddings_in_place_of_ids", "test_half_precision_is_close"}
    plain |= {"test_it_compiles_as_one_graph", "test_checkpointed_activations"}
    plain |= {"test_greedy_generation_of_a_padded_batch", "test_packed_texts_equal_single_texts"}
    plain |= {"test_steps_with_a_cache_equal_one_pass"}
    caught = {re.sub(r"\[.*", "", test) for _, test in TRAPS.values()}
    told = set(re.findall(r"`(test_\w+)`", "\n".join(rows())))
    assert caught - told == plain


def test_the_example_is_that_of_the_tests():
    ((_, _, plan),) = PROMISES
    line = plan.splitlines()[1].strip(" ,")
    assert f"`{line}`" in GUIDE


def test_links_lead_somewhere():
    for page in (ROOT / "docs").glob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
