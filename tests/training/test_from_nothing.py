"""Training from nothing: vocabularies made of the texts; runs lengthened; adapters."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2TokenizerFast

from hf_scratch_gpt.training import clear_cache, plan, train, vocabularies
from hf_scratch_gpt.training.setup import load_model

TEXT = "To be, or not to be: that is the question. Größe, naïve, 語 😀\r\n\ttabs\n" * 60
TINY = dict(n_embd=16, n_layer=2, n_head=2, n_ctx=16, drop_rate=0.0)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.fixture
def run(text, tmp_path):
    """Train a tiny model in `tmp_path / name`; the result, and what was noticed."""

    def run(name="run", **more):
        lines = []
        options = dict(report_to="none", disable_tqdm=True, cache_dir=tmp_path / "cache")
        options |= dict(max_steps=2, tokenizer="bpe:300", overrides=TINY, on_notice=lines.append)
        if "model" in more:
            options |= dict(tokenizer=None, overrides=None)
        return train(text, tmp_path / name, **{**options, **more}), lines

    return run


def test_characters(run, tmp_path):
    """Ids in the order of code points, as nanoGPT's `prepare.py` gives them; then the end."""
    result, lines = run(tokenizer="char")
    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    signs = sorted(set(TEXT))
    assert tokenizer(TEXT, verbose=False)["input_ids"] == [signs.index(sign) for sign in TEXT]
    assert tokenizer.decode(tokenizer(TEXT, verbose=False)["input_ids"]) == TEXT
    assert tokenizer.eos_token_id == len(signs)
    assert AutoModelForCausalLM.from_pretrained(result.folder).config.vocab_size == len(signs) + 1
    assert lines[0] == f"Vocabulary: {len(signs) + 1} tokens, characters, made of these texts"


def test_byte_pairs(run, tmp_path):
    """The vocabulary works in transformers' own class, and loses nothing."""
    result, lines = run(tokenizer="bpe:300")
    ours = AutoTokenizer.from_pretrained(result.folder)
    files = [str(result.folder / name) for name in ("vocab.json", "merges.txt")]
    theirs = GPT2TokenizerFast(*files)
    assert ours(TEXT, verbose=False)["input_ids"] == theirs(TEXT, verbose=False)["input_ids"]
    assert len(ours(TEXT, verbose=False)["input_ids"]) < len(TEXT.encode())
    assert ours.decode(ours(TEXT + "ж", verbose=False)["input_ids"]) == TEXT + "ж"
    assert len(ours) == 300
    assert lines[0].startswith("Vocabulary: 300 tokens, byte-level BPE")


def test_without_a_tokenizer_gpt2s_own_or_one_of_the_texts(
    run, tmp_path, monkeypatch, tiny_tokenizer
):
    result, lines = run("made", tokenizer=None)
    assert lines[0].startswith("Vocabulary: 512 tokens, byte-level BPE") or len(lines[0]) < 70
    tiny_tokenizer.save_pretrained(tmp_path / "hub")
    found = {name: str(tmp_path / "hub" / name) for name in ("vocab.json", "merges.txt")}
    monkeypatch.setattr(
        vocabularies,
        "try_to_load_from_cache",
        lambda repository, name: found[name] if repository == "gpt2" else None,
    )
    result, lines = run("found", tokenizer=None)
    assert not lines[0].startswith("Vocabulary")
    assert len(AutoTokenizer.from_pretrained(result.folder)) == len(tiny_tokenizer)


def test_a_vocabulary_is_made_once_and_anew_for_other_texts(run, text, tmp_path, monkeypatch):
    run("one")
    monkeypatch.setattr(vocabularies, "_byte_pairs", pytest.fail)
    run("two")
    monkeypatch.undo()
    text.write_text("other words altogether, " * 300)
    result, _ = run("three")
    assert "altogether" in "".join(AutoTokenizer.from_pretrained(result.folder).get_vocab())
    assert clear_cache(tmp_path / "cache") > 0
    assert not [*(tmp_path / "cache").glob("*.vocabulary")]


@pytest.mark.parametrize("name", ["bpe:", "bpe:12", "bpe:-1", "bpe:x"])
def test_sizes_that_a_vocabulary_cannot_have(run, name):
    with pytest.raises(ValueError, match=f"tokenizer={name} does not name a size; give a"):
        run(tokenizer=name)


def test_a_finished_run_is_lengthened(run, tmp_path):
    """It goes on from its last step, and cannot be shortened."""
    run(max_steps=2)
    longer, lines = run(max_steps=5)
    assert (longer.went_on_from, longer.steps) == (2, 5)
    assert "5 steps of 8 x 16 tokens, 2 of them done" in lines[-1]
    again, _ = run(max_steps=5)
    assert (again.went_on_from, again.steps) == (5, 5)
    with pytest.raises(ValueError, match=r"another run \(max_steps 5 there, 4 here"):
        run(max_steps=4)
    # Killed after the record was written, before the first of its steps.
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "max_steps": 6}))
    (tmp_path / "run" / "trainer_state.json").unlink()
    last, _ = run(max_steps=6)
    assert (last.went_on_from, last.steps) == (5, 6)


def test_no_validation_is_longer_than_the_training_before_it(run, monkeypatch):
    """Above a limit; a run that is lengthened keeps what it validates on."""
    monkeypatch.setattr(plan, "_FEWEST", 64)
    for name, steps, tokens in (("run", 4, 256), ("run", 8, 256), ("longer", 8, 512)):
        _, lines = run(name, max_steps=steps, eval_steps=0.5, validation=0.5)
        assert any(line.startswith(f"Each validation takes {tokens} of") for line in lines), lines


def test_a_plan_is_told_before_the_first_step(run):
    _, lines = run(max_steps=12, eval_steps=12)
    plan = next(line for line in lines if line.startswith("Training: "))
    config = dict(vocab=300, width=16, layers=2, positions=16)
    block = 12 * config["width"] ** 2 + 13 * config["width"]
    count = (config["vocab"] + config["positions"] + 2) * config["width"] + 2 * block
    assert f"{count:,} parameters" in plan
    assert "12 steps of 8 x 16 tokens" in plan
    assert "of memory; about " in plan
    assert lines[-1].startswith("10 steps took ")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # by PEFT
def test_an_adapter_is_trained_saved_alone_and_merged_at_load(run, tmp_path):
    base, _ = run("base")
    adapted, lines = run("adapter", model=base.folder, lora=4, learning_rate=0.1)
    assert {path.name for path in adapted.folder.glob("*.safetensors")} == {
        "adapter_model.safetensors"
    }
    assert f"of which {2 * 4 * 2 * 16 * 4:,} are trained" in next(
        line for line in lines if line.startswith("Training: ")
    )
    from peft import AutoPeftModelForCausalLM

    ids = torch.arange(10)[None]
    with torch.no_grad():
        peft = AutoPeftModelForCausalLM.from_pretrained(adapted.folder)(ids).logits
        loaded = load_model(adapted.folder)(ids).logits
        before = load_model(base.folder)(ids).logits
    torch.testing.assert_close(loaded, peft, rtol=0, atol=1e-5)
    assert (loaded - before).abs().max() > 1e-2
    run("merged", model=base.folder, lora=4, learning_rate=0.1, merge_lora=True)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    torch.testing.assert_close(merged, peft, rtol=0, atol=1e-5)


def test_an_adapter_killed_at_the_end_is_finished(run, tmp_path):
    base, _ = run("base")
    options = dict(model=base.folder, lora=2, save_steps=1)
    adapted, _ = run("adapter", **options)
    weights = (adapted.folder / "adapter_model.safetensors").read_bytes()
    for path in adapted.folder.iterdir():
        if path.name != "run.json" and not path.name.startswith("checkpoint-"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    again, _ = run("adapter", **options)
    assert again.steps == 2
    assert (again.folder / "adapter_model.safetensors").read_bytes() == weights


def test_an_adapter_needs_weights(run):
    with pytest.raises(ValueError, match="LoRA adapts pretrained weights"):
        run(lora=4)
    with pytest.raises(
        ValueError, match="merge_lora merges the adapter that lora trains; give both"
    ):
        run(merge_lora=True)
