"""`hf-scratch-gpt info`: what the table and the JSON say, and how errors end."""

import json
import re
import subprocess
import sys

import pytest

from hf_scratch_gpt import ScratchGPTConfig, ScratchGPTForCausalLM, sizing
from hf_scratch_gpt.cli.app import _COMMANDS
from hf_scratch_gpt.model.presets_scratch_gpt import PRESET_ALIASES, PRESETS


def test_table_of_three_models_fits_80_columns_with_numbers_in_line(run):
    code, out, err = run("info", "gpt2", "gpt2-xl", "gpt3", "--tokens", "300e9", "--flops", "28e12")
    assert (code, err) == (0, "")
    lines = [line.rstrip() for line in out.splitlines()]
    assert max(map(len, lines)) <= 80
    total, int8, by_6n = (
        next(line for line in lines if line[12:].startswith(label))
        for label in ("total ", "int8 ", "by 6N ")
    )
    assert total.split()[1:] == ["124,439,808", "1,557,611,200", "174,604,259,328"]
    assert int8.split()[2:] == ["118.68", "1,485.45", "166,515.60"]
    assert by_6n.endswith("355.7 years")
    assert len(lines) == 23
    assert len({len(line) for line in lines[2:]}) == 1


@pytest.mark.parametrize(
    ("switches", "total", "megabytes", "other"),
    [
        ([], "124,439,808", "474.70", "total if untied          163,037,184"),
        # The figures of Raschka's "Build a Large Language Model (From Scratch)", chapter 4.
        (["--no-tie", "--no-qkv-bias"], "163,009,536", "621.83", "total if tied"),
    ],
)
def test_one_model_fits_a_screen(switches, total, megabytes, other, run):
    code, out, _ = run("info", "gpt2", "--tokens", "1e9", "--flops", "1e12", *switches)
    assert code == 0
    assert len(out.splitlines()) <= 24
    assert re.search(rf" total +{total}\n", out)
    assert re.search(rf" float32 +MiB +{megabytes}\n", out)
    assert other in out


@pytest.mark.parametrize("name", ["gpt2", "saved"])
def test_overrides_are_fields_of_the_configuration(name, saved_model, run):
    sizes = {"--n-layer": 5, "--n-head": 2, "--n-embd": 48, "--vocab-size": 70, "--block-size": 20}
    arguments = [part for item in sizes.items() for part in item]
    name = saved_model if name == "saved" else name
    code, out, _ = run("info", "--json", name, *arguments, "--no-tie", "--no-qkv-bias")
    config = ScratchGPTConfig(
        n_layer=5, n_head=2, n_embd=48, vocab_size=70, n_ctx=20, qkv_bias=False
    )
    config.tie_word_embeddings = False
    parameters = json.loads(out)[0]["parameters"]
    assert (code, parameters["total"]) == (0, ScratchGPTForCausalLM(config).num_parameters())


def test_more_models_than_fit_are_shown_in_several_tables(run):
    code, out, _ = run("info", "gpt2", "gpt2-medium", "gpt3", columns=52)
    assert code == 0
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 52
    assert out.count("token embedding") == 3
    assert all(total in out for total in ("124,439,808", "354,823,168", "174,604,259,328"))


def test_json_is_what_sizing_computes(run):
    names = [*PRESETS, *PRESET_ALIASES]
    options = ["--batch-size", 3, "--length", 100, "--tokens", "1e9", "--flops", "2e12"]
    code, out, err = run("info", "--json", *names, *options)
    assert (code, err) == (0, "")
    listed = json.loads(out)
    assert [entry["name"] for entry in listed] == names  # every preset is known
    for entry in listed:
        config = ScratchGPTConfig.from_preset(entry["name"])
        counts = sizing.count_parameters(config)
        assert entry["parameters"]["total"] == counts.total
        assert entry["storage_bytes"]["bfloat16"] == 2 * counts.total
        cached = sizing.kv_cache_bytes(config)
        assert entry["kv_cache_bytes_per_token"] == {"float32": cached, "bfloat16": cached // 2}
        training = sizing.training_flops_per_token(config, 100)
        assert entry["flops_per_token"]["training"] == training
        assert entry["training_step"] == {"texts": 3, "tokens_of_a_text": 100, "tokens": 300}
        memory = entry["training_memory_bytes"]
        assert memory["peak"] == sizing.training_memory(config, 3, 100).peak
        assert entry["training_seconds"]["by_6N"] == 6 * counts.total * 1e9 / 2e12


@pytest.mark.parametrize("fixture", ["saved_model", "gpt2_folder"])
def test_folders_of_our_models_and_of_gpt2_are_read(fixture, run, request):
    folder = request.getfixturevalue(fixture)
    parameters = ScratchGPTForCausalLM.from_pretrained(folder).num_parameters()
    code, out, _ = run("info", "--json", folder)
    assert (code, json.loads(out)[0]["parameters"]["total"]) == (0, parameters)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt2-mediun"], r"'gpt2-mediun'; did you mean gpt2-medium"),
        (["no/such"], r"no folder no/such, and no such model was found.*Hub"),
        (["a/b/c"], r"no folder a/b/c"),
        (["./absent"], r"no folder ./absent"),
        (["/absent/too"], r"no folder /absent/too"),
        (["gpt2", "--n-head", 7], r"--n-embd 768 .* --n-head 7"),
        (["gpt2", "--n-layer", 0], r"--n-layer 0 is below 1"),
        (["gpt2", "--length", 1025], r"--length 1025.*1024 positions"),
        (["gpt2", "--batch-size", 0], r"--batch-size 0.*below 1"),
        (["gpt2", "--tokens", "1e9"], r"--flops.*both or neither"),
        (["gpt2", "--tokens", "1e9", "--flops", "-1"], r"--flops -1.0"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, message, run):
    code, out, err = run("info", *arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", err), err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"holds no config.json"),
        (b'{"model_type": "gpt2", ', r"config.json is not complete JSON"),
        (b"\xff\xfe\x00", r"config.json is not UTF-8"),
        (b"[]", r"config.json is not a JSON object"),
        (b'{"model_type": "bert"}', r"type 'bert'; give"),
        (b'{"model_type": "gpt2", "n_embd": "wide"}', r"config.json.*'hidden_size' expected int"),
        (b'{"model_type": "gpt2", "n_embd": 10, "n_head": 3}', r"hidden_size=10"),
    ],
)
def test_folders_without_a_gpt_are_refused_in_one_line(content, message, run, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    test_errors_are_one_line_and_exit_code_2([tmp_path], message, run)


@pytest.mark.parametrize("arguments", [["info"], ["info", "gpt2", "--flops", "fast"], ["inform"]])
def test_usage_errors_exit_with_code_2(arguments, run):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: " in err


@pytest.mark.parametrize("command", [[], *([name] for name in _COMMANDS)])
def test_help_fits_the_width_of_a_terminal(command, run):
    code, out, error = run(*command, "--help")
    assert (code, error) == (0, "")
    assert max(map(len, out.splitlines())) <= 80


def test_help_names_each_command_in_one_line(run):
    _, out, _ = run("--help")
    rows = [line.split() for line in out.partition("Commands")[2].splitlines()]
    assert [row[1] for row in rows if row[:1] == ["│"]] == [*_COMMANDS]


def test_module_runs_and_shows_no_traceback():
    command = [sys.executable, "-m", "hf_scratch_gpt", "info", "gpt4"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]*'gpt4'[^\n]*\n", refused.stderr)
