"""Cards of saved models: what stands in them is true, and what can be pasted runs."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_scratch_gpt.cards import stated_by
from hf_scratch_gpt.files import sha256
from hf_scratch_gpt.training import train

from .commands import convert, export
from .models import random_gpt2

TEXT = "The cat sat on the mat. " * 100


def paste(folder: Path, monkeypatch, capsys) -> str:
    """Run the example of the card in `folder`, from there; what it prints."""
    text = ModelCard.load(folder / "README.md").text
    (code,) = re.findall("^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(code, {})
    return capsys.readouterr().out


def assert_files_are_listed(folder: Path) -> None:
    """At the end, with their sizes and digests."""
    *_, table = ModelCard.load(folder / "README.md").text.split("## Files")
    rows = re.findall(r"^\| (\S+) \| ([\d,]+) \| `(\w{64})` \|$", table, re.MULTILINE)
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != "README.md")
    # What training writes after the card, or beside it.
    files = [path for path in files if path.name != "trainer_state.json"]
    assert rows == [(path.name, f"{path.stat().st_size:,}", sha256(path)) for path in files]


def test_card_of_a_converted_model(converted_tiny, monkeypatch, capsys):
    card = ModelCard.load(converted_tiny / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2", "scratch_gpt"],
    }
    assert "# A GPT of 105,648 parameters\n" in card.text
    assert "Converted from `openai-tiny` (OpenAI release) by hf_scratch_gpt" in card.text
    assert "3 layers, 4 heads, width 48, 32 positions, 400 tokens, in float32." in card.text
    assert re.search(r"logits differ by \S+ at most", card.text)
    assert "`openai-tiny` states none" in card.text
    assert_files_are_listed(converted_tiny)
    assert paste(converted_tiny, monkeypatch, capsys).startswith("The")


def test_card_of_a_model_without_a_vocabulary(small_gpt2, tmp_path, monkeypatch, capsys):
    assert convert([str(small_gpt2), str(tmp_path / "out"), "--no-verify"]) == 0
    assert "were not compared" in (tmp_path / "out" / "README.md").read_text()
    assert paste(tmp_path / "out", monkeypatch, capsys).startswith("tensor([[")


@pytest.fixture
def licensed(converted_tiny, tmp_path):
    """A GPT-2 in transformers' format, of which its card states the licence; converted."""
    source, out = tmp_path / "source", tmp_path / "base"
    assert export([str(converted_tiny), str(source)]) == 0
    head = "license: mit\nlanguage: [en, de]\ndatasets: [a/b]\ntags: [theirs]\nmodel-index: 3"
    (source / "README.md").write_text(f"---\n{head}\n---\n# Theirs\n")
    assert convert([str(source), str(out)]) == 0
    return out


@pytest.fixture
def run(tmp_path):
    """Train two steps; the folder."""
    (tmp_path / "text.txt").write_text(TEXT)

    def run(**options):
        quiet = dict(report_to="none", disable_tqdm=True, cache_dir=tmp_path / "cache")
        return train(
            tmp_path / "text.txt", tmp_path / "run", max_steps=2, **quiet, **options
        ).folder

    return run


def test_a_licence_goes_from_card_to_card(licensed, run, monkeypatch, capsys):
    folder = run(model=licensed)
    for place, source in ((licensed, "source"), (folder, "base")):
        card = ModelCard.load(place / "README.md")
        assert (card.data.license, card.data.language) == ("mit", ["en", "de"])
        assert (card.data.datasets, card.data.tags) == (["a/b"], ["gpt2", "scratch_gpt"])
        assert f"mit, as for `{source}`" in card.text
    assert "Trained from `base` by hf_scratch_gpt" in card.text
    assert re.search(
        r"`text.txt`: ([\d,]+) tokens, of which [\d,]+ to train on, [\d,]+ to", card.text
    )
    assert re.search(r"\n\| 2 \| \d\.\d{3} \| [\d,.]+ \|\n", card.text)  # the last validation
    assert_files_are_listed(folder)
    assert paste(folder, monkeypatch, capsys).startswith("The")


def test_card_of_a_model_of_transformers(tiny_tokenizer, run, monkeypatch, capsys, logged_warnings):
    """`train` takes any causal language model."""
    model = random_gpt2(vocab_size=400)
    folder = run(model=model, tokenizer=tiny_tokenizer)
    card = ModelCard.load(folder / "README.md")
    assert card.data.tags == ["gpt2"]
    assert (
        "3 layers, 4 heads, 32 numbers for a token, 400 tokens in the vocabulary, 64" in card.text
    )
    assert "trust_remote_code" not in card.text
    assert paste(folder, monkeypatch, capsys).startswith("The")


# PEFT asks by a name that transformers has deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_card_of_an_adapter(converted_tiny, run, monkeypatch, capsys):
    folder = run(model=converted_tiny, lora=2, validation=None)
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft"
    # Two matrices beside each of four projections, in three blocks.
    assert f"# An adapter of {3 * 4 * 2 * 2 * 48:,} parameters\n" in card.text
    assert "There was no validation." in card.text
    assert paste(folder, monkeypatch, capsys).startswith("The")


def test_openais_own_are_under_its_licence():
    assert stated_by("openai-community/gpt2-medium") == {"license": "mit", "language": "en"}
    assert stated_by("somebody/else") == {}


@pytest.mark.parametrize(
    "head",
    [
        "license: [[mit]]\nlanguage: {en: 1}\ndatasets: []",
        f"license: {'x' * 1000}",
        "license: 'mit",
        "- mit",
        "&a [*a, *a]",
        "license: !!python/object/apply:os.system [exit]",
        "x" * (1 << 21),
    ],
    ids=lambda head: head[:20],
)
def test_a_card_that_is_no_card_says_nothing(head, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    assert stated_by(str(tmp_path)) == {}
