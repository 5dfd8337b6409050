"""What all commands do with wrong arguments, before anything is loaded."""

import socket

import pytest

from hf_scratch_gpt.cli.options import in_options
from hf_scratch_gpt.messages import one_line


@pytest.mark.parametrize(
    ("shown", "arguments"),
    [
        ("NAME", ["info", "gpt2", ""]),
        ("MODEL", ["serve", ""]),
        ("TEXT", ["train", "", "--output-dir", "out"]),
        ("OUT", ["export", "model", ""]),
        ("FOLDER", ["clear-cache", ""]),
        ("--output-dir", ["train", "text.txt", "--output-dir", ""]),
        ("--out", ["demo", "--out", ""]),
        ("--html", ["inspect", "model", "text", "--html", ""]),
        ("--host", ["serve", "model", "--host", ""]),
        ("--preset", ["convert", "source", "out", "--preset", ""]),
        ("--tokenizer", ["convert", "source", "out", "--tokenizer", ""]),
        ("--init-from", ["train", "text.txt", "--output-dir", "out", "--init-from", ""]),
    ],
)
def test_an_empty_argument_is_named(shown, arguments, assert_refused):
    assert_refused(f"{shown} is empty; give a value", *arguments)


def test_only_options_become_options():
    said = "stride=3 and hidden_size=8, num_hidden_layers= 2, flops_per_second; a stride, n_layer/x"
    shown = "--stride 3 and hidden_size=8, --n-layer 2, flops_per_second; a stride, n_layer/x"
    assert in_options(said, ["stride", "n_layer"]) == shown


def test_errors_of_the_system_are_told_without_their_numbers(tmp_path):
    with pytest.raises(OSError, match="Errno") as missing:
        (tmp_path / "no\x1b[31m").read_text()
    assert one_line(missing.value) == f"{tmp_path}/no\\x1b[31m: No such file or directory"


def test_what_would_hold_a_folder_may_not_be_a_file(
    tmp_path, assert_refused, openai_tiny, monkeypatch
):
    monkeypatch.setattr("hf_scratch_gpt.training.vocabularies.CACHE", tmp_path / "cache")
    file = tmp_path / "file.txt"
    file.write_text("some text " * 99)
    for place in (file, file / "below"):
        for command in (
            ["convert", openai_tiny, place],
            ["new", "my_gpt", place],
            ["demo", "--out", place],
            ["train", file, "--tokenizer", "char", "--output-dir", place],
        ):
            assert_refused(f"{file} is a file; choose another folder", *command)
    assert_refused("holds files of others", "demo", "--out", tmp_path)
    for name in ("info", "generate"):
        assert_refused("is a file; give the folder of a saved model", name, file)


def test_files_of_a_negative_size_are_refused(openai_tiny, tmp_path, assert_refused):
    assert_refused(
        "'-1GB' is not a size of a file",
        *("convert", openai_tiny, tmp_path / "out", "--max-shard-size", "-1GB"),
    )
    assert not list(tmp_path.iterdir())


def test_an_address_that_is_taken_is_told_before_the_model_is_loaded(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, error = run("serve", "no/model", "--port", port)
    assert (code, out) == (1, "")
    assert error.startswith(f"error: cannot listen at 127.0.0.1, port {port}: Address already in")
