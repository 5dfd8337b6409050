"""`hf-scratch-gpt generate`: what it reads, what it shows, and how fast it is asked to be."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_scratch_gpt.engine.compiling import compiled
from hf_scratch_gpt.engine.one_token import OneToken

from ..models import TOKENS, random_gpt2

WINDOW = 16
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }};{% endfor %}a"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, tiny_tokenizer):
    """A random GPT-2 with a vocabulary, saved by transformers."""
    folder = tmp_path_factory.mktemp("generate") / "gpt2"
    torch.manual_seed(0)
    sizes = dict(n_layer=2, vocab_size=400, n_positions=WINDOW)
    random_gpt2(**sizes, **dict.fromkeys(TOKENS)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def steps(monkeypatch):
    """One entry for each token that the C++ reads."""
    taken, read = [], OneToken._read
    monkeypatch.setattr(OneToken, "_read", lambda *given: taken.append(1) or read(*given))
    return taken


@pytest.fixture
def piped(monkeypatch):
    """Hand a text to standard input."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


@pytest.fixture
def typed(monkeypatch):
    """A terminal in which these lines are typed; an exception is what a key sends."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def type_(*keys):
        keys = iter(keys)

        def enter(_=""):
            key = next(keys)
            if isinstance(key, type):
                raise key
            return key

        monkeypatch.setattr(sys, "stdin", Terminal())
        monkeypatch.setattr("builtins.input", enter)

    return type_


@torch.no_grad()
def logprobs_of_windows(model, prompt, written):
    """Of GPT-2's own logits, over windows that begin anew with the last half of one before."""
    logprobs, window, size = [], list(prompt), model.config.n_positions
    for token in written:
        if len(window) >= size:
            window = window[-size // 2 :]
        logits = model(torch.tensor([window])).logits[0, -1].double()
        logprobs.append(torch.log_softmax(logits, dim=-1)[token].item())
        window.append(token)
    return logprobs


@pytest.mark.parametrize("prompt", ["Hello", "A prompt of more tokens than the window has."])
def test_json_holds_text_ids_and_logprobs(prompt, gpt2, tiny_tokenizer, run):
    arguments = ["generate", gpt2, prompt, "--json", "--max-new-tokens", 30, "--samples", 2]
    code, out, error = run(*arguments)
    assert code == 0, error
    texts = [json.loads(line) for line in out.splitlines()]
    assert [(text["prompt"], text["seed"]) for text in texts] == [(prompt, 0), (prompt, 1)]
    assert texts[0]["ids"] != texts[1]["ids"]
    model, ids = GPT2LMHeadModel.from_pretrained(gpt2), tiny_tokenizer(prompt).input_ids
    for text in texts:
        assert len(text["ids"]) == 30
        whole = tiny_tokenizer.decode(ids + text["ids"])
        assert text["text"] == whole[len(prompt) :]
        expected = logprobs_of_windows(model, ids, text["ids"])
        assert text["logprobs"] == pytest.approx(expected, abs=1e-5)
    assert f"did not fit the window of {WINDOW}" in error


def test_after_the_last_seed_comes_the_first(gpt2, run):
    arguments = ["generate", gpt2, "Hello", "--json", "--max-new-tokens", 1, "--plain"]
    code, out, error = run(*arguments, "--seed", 2**32 - 1, "--samples", 2)
    assert code == 0, error
    assert [json.loads(line)["seed"] for line in out.splitlines()] == [2**32 - 1, 0]


def test_a_pipe_holds_a_prompt_a_line(gpt2, run, piped):
    piped("Hello\n\nA line\r\n")
    code, out, _ = run("generate", gpt2, "--json", "--max-new-tokens", 2)
    assert code == 0
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["Hello", "A line"]
    piped("Hello\nA line")
    _, out, _ = run("generate", gpt2, "--max-new-tokens", 2)
    assert out.startswith("Hello")
    assert "\nA line" in out
    piped("Hello\nA line")
    _, out, _ = run("generate", gpt2, "-", "--json", "--max-new-tokens", 2)
    assert json.loads(out)["prompt"] == "Hello\nA line"


def test_what_standard_input_may_not_hold(gpt2, assert_refused, monkeypatch, piped):
    piped("\n\n")
    assert_refused("standard input holds no prompt", "generate", gpt2)
    for place in ([], ["-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), "utf-8"))
        assert_refused("standard input is not utf-8 text", "generate", gpt2, *place)


def test_a_terminal_is_asked_for_prompts(gpt2, run, typed):
    typed("Hello", KeyboardInterrupt, " ", "world", EOFError)
    code, out, error = run("generate", gpt2, "--max-new-tokens", 2, "--json")
    assert code == 0
    texts = [json.loads(line) for line in out.splitlines()]
    assert [(text["prompt"], text["seed"]) for text in texts] == [("Hello", 0), ("world", 1)]
    assert "Ctrl-D ends" in error


def test_a_chat_template_keeps_the_conversation(tmp_path, tiny_tokenizer, run, typed):
    model = random_gpt2(vocab_size=400, n_positions=24, **dict.fromkeys(TOKENS))
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    typed("b", "b", "b", EOFError)
    arguments = ["--max-new-tokens", 2, "--temperature", 0, "--json", "--plain"]
    code, out, error = run("generate", tmp_path, *arguments)
    assert code == 0, error
    first, second, third = [json.loads(line) for line in out.splitlines()]
    # Of the third question, what was said at first no longer fits.
    for answer, before in ((first, []), (second, [first]), (third, [second])):
        said = "".join(f"ub;a{one['text']};" for one in before) + "ub;a"
        expected = logprobs_of_windows(model, tiny_tokenizer(said).input_ids, answer["ids"])
        assert answer["logprobs"] == pytest.approx(expected, abs=1e-5)
    assert error.count("the first 2 messages no longer fit the window and were left out") == 1


@pytest.mark.parametrize(
    ("options", "is_compiled"), [([], True), (["--fast"], True), (["--plain"], False)]
)
def test_compiled_code_writes_unless_it_is_turned_off(options, is_compiled, gpt2, run, steps):
    code, _, error = run("generate", gpt2, "Hello", "--max-new-tokens", 4, *options)
    assert (code, error) == (0, "")
    assert bool(steps) == is_compiled


def test_without_a_compiler(gpt2, run, assert_refused, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    arguments = ["generate", gpt2, "Hello", "--max-new-tokens", 2]
    code, out, error = run(*arguments)
    assert (code, out[:5], error.count("\n")) == (0, "Hello", 1)
    assert "no C++ compiler is there" in error
    assert run(*arguments, "--plain") == (0, out, "")
    compiled.cache_clear()
    assert_refused("install g++", *arguments, "--fast")


def test_a_model_of_others_is_written_with(tmp_path, tiny_tokenizer, run, assert_refused):
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    code, out, error = run("generate", tmp_path, "Hello", "--max-new-tokens", 2)
    assert (code, out[:5], error) == (0, "Hello", "")
    assert_refused("not a model of hf_scratch_gpt", "generate", tmp_path, "Hello", "--fast")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "the prompt '' has 0 tokens"),
        (["Hello", "--weights", "int8", "--temperature", "1e-9"], "--temperature 1e-09 is too low"),
        (["Hello", "--plain", "--fast"], "--plain turns off what --fast"),
        (["Hello", "--plain", "--weights", "int8"], "--plain turns off what --fast"),
    ],
)
def test_refuses(arguments, message, gpt2, assert_refused):
    assert_refused(message, "generate", gpt2, *arguments)


@pytest.mark.long
@pytest.mark.parametrize("end", ["Ctrl-C", "nobody reads any more"])
def test_a_text_that_is_cut_short_shows_no_traceback(end, gpt2):
    command = [sys.executable, "-m", "hf_scratch_gpt", "generate", str(gpt2), "Hello"]
    command += ["--max-new-tokens", "1000000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(5) == b"Hello"
        if end == "Ctrl-C":
            process.send_signal(signal.SIGINT)
            _, error = process.communicate()
            # A shell has 130 for both; Python may choose the signal itself.
            assert process.returncode in (130, -signal.SIGINT)
        else:
            process.stdout.close()
            error = process.stderr.read()
            assert process.wait() == 1
    assert error == b""


@pytest.mark.long
def test_keys_in_a_real_terminal(gpt2):
    """History, Ctrl-C at the prompt and in a text, Ctrl-D."""
    process, terminal = pty.fork()
    if process == 0:
        command = [sys.executable, "-m", "hf_scratch_gpt", "generate", str(gpt2)]
        os.execv(sys.executable, [*command, "--max-new-tokens", "1000000000"])
    shown = b""

    def wait_for(text: bytes) -> None:
        nonlocal shown
        end = time.monotonic() + 120
        while text not in shown:
            assert time.monotonic() < end, shown
            if select.select([terminal], [], [], 1)[0]:
                shown += os.read(terminal, 4096)
        shown = shown.partition(text)[2]

    try:
        for keys, answer in (
            (b"", b"Ctrl-D ends\r\n> "),
            (b"abc", b"abc"),
            (b"\x03", b"> "),  # a line is begun anew
            (b"Hello\n", b"\nHello"),
            (b"\x03", b"note: stopped\r\n> "),
            (b"\x1b[A\n", b"\nHello"),  # the arrow up
            (b"\x03", b"note: stopped\r\n> "),
        ):
            os.write(terminal, keys)
            wait_for(answer)
            time.sleep(0.2)  # a signal between a key and the wait for the next is lost in readline
        os.write(terminal, b"\x04")
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    finally:
        os.close(terminal)
