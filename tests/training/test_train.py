"""`train`: from texts to a saved model, as its arguments say, and no step further."""

import math
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
    trainer_pt_utils,
)
from transformers.utils import logging as transformers_logging

from hf_scratch_gpt import ScratchGPTConfig, ScratchGPTForCausalLM
from hf_scratch_gpt.training import callbacks, parse_flags, train
from hf_scratch_gpt.training.blocks import Blocks
from hf_scratch_gpt.training.corpus import tokenize
from hf_scratch_gpt.training.run_folder import last_checkpoint
from hf_scratch_gpt.training.setup import make_arguments, part_words

from ..models import random_gpt2

TINY = dict(n_embd=32, n_layer=2, n_head=2, n_ctx=16, drop_rate=0.0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of about a hundred blocks of 16 tokens."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text((Path(__file__).parents[2] / "LICENSE").read_text()[:3000])
    return path


@pytest.fixture
def run(text, tiny_tokenizer, tmp_path):
    """Train a tiny model, in `tmp_path / name`."""

    def run(name="run", sources=text, **more):
        quiet = dict(report_to="none", disable_tqdm=True)
        run = dict(tokenizer=tiny_tokenizer, cache_dir=tmp_path / "cache", validation=0.1)
        given = {**quiet, **run, "max_steps": 6, "logging_steps": 1, **more}
        given.setdefault("overrides", None if "model" in given else TINY)
        return train(sources, tmp_path / name, **given)

    return run


def values(history, name):
    return [entry[name] for entry in history if name in entry]


def held_out_loss(model, blocks):
    """Loss of all predictions in `blocks`, in float64."""
    ids = torch.stack([block["input_ids"] for block in blocks])
    with torch.no_grad():
        logits = model.double().eval()(ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


@pytest.fixture
def held_out(text, tiny_tokenizer, tmp_path):
    """The blocks on which `run` validates."""
    return Blocks(tokenize(text, tiny_tokenizer, cache_dir=tmp_path / "cache"), 16).split(0.1)[1]


def test_texts_become_a_saved_model_with_its_tokenizer(run, held_out, tiny_tokenizer, tmp_path):
    result = run(eval_steps=3, per_device_eval_batch_size=4, report_to="tensorboard")
    assert (result.folder, result.steps) == (tmp_path / "run", 6)
    assert (result.interrupted, result.went_on_from) == (False, 0)
    model = AutoModelForCausalLM.from_pretrained(result.folder)
    assert type(model) is ScratchGPTForCausalLM
    config = model.config
    assert (config.vocab_size, config.hidden_size, config.use_cache) == (400, 32, True)
    assert {config.bos_token_id, config.eos_token_id, config.pad_token_id} == {399}
    again = AutoTokenizer.from_pretrained(result.folder)
    assert again("The work")["input_ids"] == tiny_tokenizer("The work")["input_ids"]
    saved = PreTrainedTokenizerFast.from_pretrained(result.folder)
    assert saved.model_max_length == 16 < tiny_tokenizer.model_max_length

    assert len(held_out) % 4, "the last batch is not full"
    assert result.last("eval_loss") == pytest.approx(held_out_loss(model, held_out), abs=1e-6)
    losses = values(result.history, "eval_loss")
    assert len(losses) == 2
    assert values(result.history, "eval_perplexity") == pytest.approx([*map(math.exp, losses)])
    assert result.last("loss") < values(result.history, "loss")[0] < math.log(400) + 0.1
    assert result.last("nothing") is None
    assert (result.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(result.folder.glob("runs/*/events*"))) == 1


def test_one_batch_is_learned_by_heart(run, tmp_path):
    (tmp_path / "short.txt").write_text("The quick brown fox jumps over the lazy dog. " * 2)
    steps = dict(max_steps=150, logging_steps=50, learning_rate=1e-2, weight_decay=0.0)
    options = dict(validation=None, lr_scheduler_type="constant", **steps)
    result = run(sources=tmp_path / "short.txt", **options)
    assert result.last("loss") < 0.01
    assert result.last("eval_loss") is None


def test_validation_may_have_texts_of_its_own(run, tiny_tokenizer, tmp_path):
    (tmp_path / "other.txt").write_text("Nobody expects the perplexity of other texts. " * 9)
    result = run(validation=tmp_path / "other.txt", block_size=8)
    model = AutoModelForCausalLM.from_pretrained(result.folder)
    others = tokenize(tmp_path / "other.txt", tiny_tokenizer, cache_dir=tmp_path / "cache")
    wanted = held_out_loss(model, Blocks(others, 8))
    assert result.last("eval_loss") == pytest.approx(wanted, abs=1e-6)


def test_a_long_validation_is_bounded_and_spread_evenly(run, text, tiny_tokenizer, tmp_path):
    notices = []
    options = dict(validation=0.5, max_steps=1, on_notice=notices.append)
    result = run(validation_tokens=100, per_device_eval_batch_size=4, **options)
    ids = tokenize(text, tiny_tokenizer, cache_dir=tmp_path / "cache")
    whole = Blocks(ids, 16).split(0.5)[1]
    chosen = [whole[i * len(whole) // 6] for i in range(6)]  # of 16 tokens
    model = AutoModelForCausalLM.from_pretrained(result.folder)
    assert result.last("eval_loss") == pytest.approx(held_out_loss(model, chosen), abs=1e-6)
    where, bound, *_ = notices
    assert f"Token ids: 0.0 MB in {ids.path}, kept" in where
    assert "`hf-scratch-gpt clear-cache` removes" in where
    assert bound == f"Each validation takes 96 of {16 * len(whole)} tokens, spread evenly"
    notices.clear()
    run("whole", **options)
    assert notices[0] == where
    assert not any("validation takes" in line for line in notices), "a short one is taken whole"
    with pytest.raises(ValueError, match=r"validation_tokens=0 is below 1; give 1 or more"):
        run("none", validation_tokens=0)


def test_evaluation_does_not_join_what_it_has_found_for_each_batch(run, monkeypatch):
    def join(*_):
        raise AssertionError("joined anew for each batch, the time is quadratic")

    monkeypatch.setattr(trainer_pt_utils, "nested_concat", join)
    assert run(per_device_eval_batch_size=2, max_steps=2).last("eval_loss") is not None


def test_samples_are_written_on_the_way_and_change_nothing(run):
    samples = []
    options = dict(overrides={**TINY, "drop_rate": 0.1}, eval_strategy="no")
    sampling = dict(sample_steps=4, on_sample=lambda *sample: samples.append(sample))
    result = run(sample_prompt="The work", **sampling, **options)
    assert [step for step, _ in samples] == [4, 6]
    assert all(text.startswith("The work") and len(text) > 12 for _, text in samples)
    assert values(result.history, "loss") == values(run("other", **options).history, "loss")
    for prompt in ("", "a b c d e f g h i j k l m n o p q r s t u v w x y z"):
        run(f"run{len(prompt)}", sample_prompt=prompt, max_steps=2, sample_steps=0.5, **options)


@pytest.mark.parametrize("kind", ["ours", "gpt2", pytest.param("object", marks=pytest.mark.long)])
def test_a_saved_model_is_trained_on(kind, run, held_out, tmp_path):
    first = run("first").folder
    options = {}
    if kind == "gpt2":
        tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 399)
        start = random_gpt2(vocab_size=400, n_positions=16, **tokens)
        start.save_pretrained(tmp_path / "gpt2")
        model = tmp_path / "gpt2"
    else:
        start = AutoModelForCausalLM.from_pretrained(first)
        model = first if kind == "ours" else AutoModelForCausalLM.from_pretrained(first)
        options["tokenizer"] = None  # its own
    result = run(model=model, learning_rate=0.0, **options)
    assert result.last("eval_loss") == pytest.approx(held_out_loss(start, held_out), abs=2e-6)
    trained = AutoModelForCausalLM.from_pretrained(result.folder)
    assert type(trained) is ScratchGPTForCausalLM
    assert isinstance(start, GPT2LMHeadModel) == (kind == "gpt2")
    with pytest.raises(ValueError, match=r"another run \(learning_rate 0\.0 there, 5e-05"):
        run(model=model, **options)


def test_label_smoothing_trains_on_the_next_token_as_with_gpt2(run, tmp_path):
    fields = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 399)
    fields |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    random_gpt2(vocab_size=400, n_positions=16, **fields).save_pretrained(tmp_path / "gpt2")
    losses = []
    for model_class in (GPT2LMHeadModel, ScratchGPTForCausalLM):
        model = model_class.from_pretrained(tmp_path / "gpt2")
        model.loss_type = "ForCausalLM"  # GPT-2's own divides by the number of labels unshifted
        options = dict(label_smoothing_factor=0.1, learning_rate=1e-2, eval_steps=5, max_steps=10)
        history = run(model_class.__name__, model=model, **options).history
        losses.append(values(history, "loss") + values(history, "eval_loss"))
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert losses[1][-1] < losses[1][-2], "it learns"


class Signals(TrainerCallback):
    """Sends this process a signal when the step number `step` begins."""

    def __init__(self, step, *numbers):
        self.step, self.numbers = step, numbers

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            for number in self.numbers:
                signal.raise_signal(number)


@pytest.mark.parametrize(
    ("number", "strategy"),
    [
        (signal.SIGINT, "steps"),
        pytest.param(signal.SIGINT, "epoch", marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, "no", marks=pytest.mark.long),
    ],
)
def test_a_signal_stops_with_a_checkpoint_to_go_on_from(number, strategy, run, logged_warnings):
    options = dict(overrides={**TINY, "drop_rate": 0.1}, per_device_train_batch_size=8)
    options |= dict(max_steps=10, eval_steps=3, save_steps=10)
    options |= dict(save_strategy=strategy, eval_strategy=strategy)
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    # torchrun sends a SIGTERM behind a Ctrl-C
    stop = run(callbacks=[Signals(3, number, signal.SIGTERM)], **options)
    assert (stop.interrupted, stop.steps) == (True, 3)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert [path.name for path in stop.folder.glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (stop.folder / "model.safetensors").exists()
    assert logged_warnings == [
        "Stopping after this step, with a checkpoint; Ctrl-C again ends at once"
    ]
    result = run(**options)
    assert (result.interrupted, result.steps, result.went_on_from) == (False, 10, 3)
    whole = run("whole", **options)
    for name in ("loss", "eval_loss"):
        assert values(result.history, name) == values(whole.history, name)


def test_a_second_interrupt_ends_at_once(run, tmp_path, logged_warnings):
    # As in a terminal; a shell starts what runs in the background with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(callbacks=[Signals(3, signal.SIGINT, signal.SIGINT)])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list((tmp_path / "run").glob("checkpoint-3"))


class Diverge(TrainerCallback):
    """Makes a weight NaN after `step`."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            model.model.norm.weight.data[0] = float("nan")


@pytest.mark.parametrize("step", [4, 6])
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (dict(validation=0.1, save_steps=1, eval_steps=1), "validation loss"),
        (dict(validation=None, save_steps=1), "model.norm.weight"),
        (dict(validation=None, save_strategy="no", logging_steps=100), None),
    ],
)
def test_a_training_that_diverges_is_an_error_and_is_not_saved(
    step, arguments, name, run, tmp_path
):
    if name is None:  # the next loss tells, if there is one, or the weights in the end
        name = "loss" if step < 6 else "model.norm.weight"
    said = rf"^{name} is NaN or infinite after {step} steps.*lower learning_rate=0\.0006"
    with pytest.raises(ValueError, match=said):
        run(callbacks=[Diverge(step)], **arguments)
    saved = list((tmp_path / "run").rglob("*.safetensors"))
    for path in saved:
        assert all(weight.isfinite().all() for weight in load_file(path).values())
    assert len(saved) == 2 * ("save_steps" in arguments)


def test_a_folder_takes_one_run_and_that_once(run, tmp_path):
    result = run()
    files = {path: path.stat().st_mtime_ns for path in result.folder.rglob("*")}
    again = run()
    assert (again.steps, again.went_on_from, again.history) == (6, 6, result.history)
    # neither how often it reports nor how a batch is made up is another run
    again = run(eval_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert again.went_on_from == 6
    with pytest.raises(
        ValueError,
        match=r"another run \(batch_size 8 there, 4 here; seed 42 there, 1 here\); choose",
    ):
        run(per_device_train_batch_size=4, seed=1)
    with pytest.raises(ValueError, match=r"\(model\.hidden_size 32 there, 16 here; model\.inter"):
        run(overrides={**TINY, "n_embd": 16})
    (tmp_path / "new.txt").write_text("Other words. " * 200)
    with pytest.raises(
        ValueError, match=r"\(texts \"\w+\.\.\.\w+\" there, .* here; tokens \d+ there"
    ):
        run(sources=tmp_path / "new.txt")
    assert {path: path.stat().st_mtime_ns for path in result.folder.rglob("*")} == files

    (tmp_path / "mine").mkdir()
    for name, content in [("thesis.txt", "precious"), ("run.json", "{"), ("run.json", "[]")]:
        (tmp_path / "mine" / name).write_text(content)
        with pytest.raises(ValueError, match=r"mine holds files, but not a run \(run\.json\); ch"):
            run("mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_a_run_killed_behind_its_last_step_takes_no_other(run):
    result = run()
    wanted = {
        path.name: path.read_bytes()
        for path in result.folder.iterdir()
        if path.suffix in (".safetensors", ".json", ".py")
    }
    (result.folder / "model.safetensors").write_bytes(b"half")
    (result.folder / "trainer_state.json").unlink()
    again = run()
    assert (again.steps, again.went_on_from) == (6, 6)
    assert values(again.history, "loss") == values(result.history, "loss")
    for name, content in wanted.items():
        if name != "trainer_state.json":
            assert (result.folder / name).read_bytes() == content, name


def test_only_the_last_checkpoints_are_kept(run, tmp_path):
    run(max_steps=4, save_steps=1, save_total_limit=3)
    kept = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert kept == {"checkpoint-2", "checkpoint-3", "checkpoint-4"}
    options = dict(save_steps=1, eval_steps=1, save_total_limit=1, load_best_model_at_end=True)
    best = run("best", max_steps=3, learning_rate=0.0, **options)
    kept = {path.name for path in best.folder.glob("checkpoint-*")}
    assert kept == {"checkpoint-1", "checkpoint-3"}


def test_what_does_not_fit_is_said_before_anything_is_done(run, text, tmp_path):
    nowhere = tmp_path / "none.txt"
    ScratchGPTForCausalLM(ScratchGPTConfig(vocab_size=97, **TINY)).save_pretrained(tmp_path / "97")
    small = tmp_path / "97"
    for message, options in [
        (r"no preset is called 'gpt2-hug'; did you mean gpt2", dict(model="gpt2-hug")),
        (r"no preset is called 'gpt2-hug'", dict(model="gpt2-hug", tokenizer=None)),
        (r"the tokenizer '.*/no' cannot be loaded", dict(tokenizer=tmp_path / "no")),
        (r"the tokenizer '.*/97' cannot be loaded", dict(model=small, tokenizer=None)),
        (r"the model '.*/no' cannot be loaded", dict(model=tmp_path / "no")),
        (r"the tokenizer has 400 tokens, the model 97; give the", dict(model=small)),
        (r"the tokenizer has 400 tokens, the model 9;", dict(overrides=dict(n_vocab=9))),
        (r"overrides=\{'n_layer': 1\} need a preset", dict(model=small, overrides=dict(n_layer=1))),
        (r"block_size=17 exceeds the model's 16 positions; give 16", dict(block_size=17)),
        (r"block_size=1 leaves no token to predict", dict(block_size=1)),
        (r"none\.txt' does not exist", {}),
        (r"tokens, less than one block of 5000; give more", dict(overrides=dict(n_ctx=5000))),
        (r"2 blocks of 600 tokens are too few", dict(overrides=dict(n_ctx=600), validation=0.9)),
        (r"1\.5 is not a part of the blocks; give", dict(validation=1.5)),
    ]:
        is_early = (
            options.keys() <= {"model", "tokenizer", "block_size"} and 1 not in options.values()
        )
        sources = nowhere if is_early else text
        with pytest.raises(ValueError, match=message) as raised:
            run(sources=sources, **options)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_cpu_trains_by_the_engine_which_is_not_saved(run, tmp_path, monkeypatch):
    saved, done = tmp_path / "run" / "model.safetensors", []

    def note(name):
        return lambda model: done.append((name, type(model), saved.exists())) or model

    engine = SimpleNamespace(optimize_for_training=note("optimize"), restore=note("restore"))
    monkeypatch.setitem(sys.modules, "hf_scratch_gpt.engine.swap", engine)
    run(max_steps=2)
    names = [(name, ScratchGPTForCausalLM, False) for name in ("restore", "optimize", "restore")]
    assert done == names
    assert saved.exists()


def test_the_curve_shows_both_losses_with_units(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))
    )
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}, {"step": 2, "eval_loss": 2.75}]
    callbacks.draw_loss(history, tmp_path / "loss.png")
    (axes,) = drawn[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss (nats per token)")
    drawn_points = [line.get_xydata().tolist() for line in axes.lines]
    assert drawn_points == [[[1, 3.0], [2, 2.5]], [[2, 2.75]]]
    labels = [text.get_text() for text in axes.get_legend().texts]
    assert labels == ["training, 2.500 at step 2", "validation, 2.750 at step 2"]
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_minus_one_step_is_transformers_word_for_as_many_as_there_are(tmp_path):
    given = dict(max_steps=-1, num_train_epochs=2)
    arguments = make_arguments(tmp_path, True, False, given)
    assert (arguments.max_steps, arguments.num_train_epochs) == (-1, 2)


def test_flags_of_a_command_line_become_arguments():
    flags = ["--learning-rate", "1e-3", "--max_steps=7", "--bf16", "--lr_scheduler_kwargs", "{}"]
    assert parse_flags(flags) == dict(
        learning_rate=1e-3, max_steps=7, bf16=True, lr_scheduler_kwargs="{}"
    )
    assert parse_flags([]) == {}
    assert part_words(["a.txt", "--max-steps", "7", "b"]) == (["a.txt", "b"], dict(max_steps=7))
    for flags, message in [
        (["--learning-rat", "1"], r"--learning-rat is not an argument of .*; did you mean --l"),
        (["--max-steps", "many"], r"^--max-steps: invalid int value: 'many'"),
        (["--zzz"], r"--zzz is not an argument of training$"),
        (["word"], r"word is not an argument of training"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_flags(flags)


def test_progress_takes_the_place_of_bars_and_printed_logs(run, capfd):
    class Progress(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            steps.append(state.global_step)

    steps = []
    transformers_logging.enable_progress_bar()
    try:
        run(progress=Progress(), disable_tqdm=None, max_steps=2, eval_strategy="no")
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.disable_progress_bar()
    assert steps == [1, 2, 2]
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.strip().rpartition("\r")[2].startswith("Tokenizing: 100%")


def test_a_checkpoint_counts_once_all_processes_have_written_theirs(tmp_path):
    def checkpoint(step, numbers, state='{"global_step": 1}'):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(state)
        for number in numbers:
            torch.save([1], folder / f"rng_state{number}.pth")
        return folder

    assert last_checkpoint(tmp_path) is None
    alone, two = checkpoint(9, [""]), checkpoint(10, ["_0", "_1"])
    checkpoint(11, ["_0"])
    half = checkpoint(12, ["_0", "_1"]) / "rng_state_1.pth"
    half.write_bytes(half.read_bytes()[:-20])
    checkpoint(13, [""], state='{"global_st')
    checkpoint(14, [])
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == two
    assert last_checkpoint(tmp_path, before=10) == alone
