"""`hf-scratch-gpt eval`: what it prints, and what it refuses."""

import json

import pytest

from hf_scratch_gpt.evaluation import evaluate
from hf_scratch_gpt.model.modeling_scratch_gpt import ScratchGPTForCausalLM

TEXTS = [
    "To be, or not to be: that is the question.\n" * 20,
    "Whether 'tis nobler in the mind. " * 9,
]


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": TEXTS[1]}))
    return tmp_path


def test_it_prints_what_is_measured(converted_tiny, tiny_tokenizer, texts, run):
    arguments = ["eval", converted_tiny, texts / "a.txt", texts / "b.jsonl", "--text-field", "body"]
    code, out, error = run(*arguments, "--stride", 8, "--json")
    assert (code, error) == (0, "")
    numbers = json.loads(out)
    model = ScratchGPTForCausalLM.from_pretrained(converted_tiny)
    expected = evaluate(model, tiny_tokenizer, [(text, True, 1) for text in TEXTS], stride=8)
    assert numbers["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert numbers["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-5)
    assert (numbers["tokens"], numbers["texts"]) == (expected.tokens, 2)
    assert (numbers["window"], numbers["stride"]) == (32, 8)
    code, out, error = run(*arguments, "--stride", 8)
    assert (code, error) == (0, "")
    assert f"perplexity      {expected.perplexity:,.2f}" in out
    assert f"{expected.tokens:,}, of which {expected.scored_tokens:,} scored" in out


def test_it_refuses(converted_tiny, saved_model, texts, assert_refused):
    (texts / "empty.txt").write_text("")
    assert_refused("a stride of 33 tokens", "eval", converted_tiny, texts / "a.txt", "--stride", 33)
    assert_refused("'missing.txt' does not exist", "eval", converted_tiny, "missing.txt")
    assert_refused("empty.txt is empty", "eval", converted_tiny, texts / "empty.txt")
    assert_refused("no text in field 'text'", "eval", converted_tiny, texts / "b.jsonl")
    assert_refused("tokenizer", "eval", saved_model, texts / "a.txt")
