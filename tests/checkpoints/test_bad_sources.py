"""What is wrong with a source is told in one line, and nothing is left of the result.

A state dict is spoilt before it is written, a file afterwards.
"""

import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from functools import partial
from hashlib import sha256

import pytest
import torch

from ..commands import convert as main
from .checkpoints import (
    KINDS,
    RunsCode,
    add,
    assert_converts,
    assert_refused,
    forward,
    hf_source,
    llmc,
    misshape,
    nanogpt,
    poison,
    random_weights,
    textbook,
    write_source,
)


def round_off(state, name):
    state[name] = state[name].round().int()


WEIGHT = r"\S+2[./]\S+w\S*"
SPOILT = {
    "missing tensor": (dict.__delitem__, r"lacks the tensors \S*2\.\S+weight"),
    "extra tensors": (add, rf"has tensors that GPT-2 has not: {WEIGHT}0, .*{WEIGHT}4 and 3 more$"),
    "wrong shape": (misshape, rf"{WEIGHT} has shape \[\d+, \d+\], and the configuration asks for"),
    "NaN": (poison, rf"{WEIGHT} holds NaN or infinity"),
    "integers": (round_off, rf"{WEIGHT} holds torch\.int32; weights are torch\.float32"),
}


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        *((case, kind) for case in SPOILT for kind in [*KINDS, "openai"] if case != "integers"),
        ("integers", "hf"),
    ],
)
def test_spoilt_tensors_are_refused(case, kind, tmp_path, capsys):
    change, message = SPOILT[case]
    arguments = write_source(kind, tmp_path / "source", change)
    assert_refused(arguments, tmp_path / "out", message, capsys)


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        *((damage, kind) for damage in ("cut", "flipped bit", "runs code") for kind in KINDS),
        *(("text", "hf"), ("empty", "hf"), ("text", "textbook"), ("empty", "textbook")),
        ("archive runs code", "nanogpt"),
    ],
)
def test_damaged_files_are_refused(damage, kind, tmp_path, capsys):
    arguments = write_source(kind, tmp_path / "source")
    files = [path for path in (tmp_path / "source").iterdir() if path.suffix != ".json"]
    path = max(files, key=lambda path: path.stat().st_size)
    data = path.read_bytes()
    code = {"model": RunsCode(), "tok_emb.weight": RunsCode()}
    if damage == "flipped bit":
        if kind == "hf":  # the format has no checksum of its own
            (path.parent / "SHA256SUMS").write_text(f"{sha256(data).hexdigest()}  {path.name}\n")
        place = len(data) // 2  # within the weights
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    elif damage == "archive runs code":
        torch.save(code, path)
    else:
        replaced = {"cut": data[: len(data) // 2], "text": b"Hello, world!\n" * 50, "empty": b""}
        path.write_bytes((replaced | {"runs code": pickle.dumps(code)})[damage])
    assert_refused(arguments, tmp_path / "out", rf"\S*{path.name}", capsys)
    assert not os.path.exists("/tmp/this-must-not-exist")


def put(place, content):
    data = content if isinstance(content, bytes) else struct.pack("i", content)
    return lambda old: old[:place] + data + old[place + len(data) :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-100], r"model\.bin has \d+ bytes, and the sizes in its header take"),
        (lambda data: data[:500], r"does not begin like a checkpoint of llm\.c"),
        (put(4, 7), r"version 7; versions 3 and 5"),
        (put(16, -3), r"num_hidden_layers=-3"),
        (put(16, 1 << 30), r"\S+model\.bin says that it has 1073741824 layers, over 4096"),
        (put(12, 65), r"model\.bin says that 65 of 64 rows are tokens"),
        (put(20, 0), r"model\.bin: num_attention_heads=0 is below 1"),
        (put(2000, struct.pack("f", float("nan"))), r"wte\.weight holds NaN or infinity"),
        (put(0, b"Hello, world!\n"), r"\S+model\.bin is not a file of tensors"),
    ],
)
def test_spoilt_llmc_files_are_refused(change, message, tmp_path, capsys):
    llmc(tmp_path / "model.bin", random_weights())
    path = tmp_path / "model.bin"
    path.write_bytes(change(path.read_bytes()))
    assert_refused([str(path)], tmp_path / "out", message, capsys)


@pytest.mark.parametrize("place", ["SHA256SUMS", "model.bin.sha256", "hub cache", "hub folder"])
def test_recorded_digests_are_compared(place, tmp_path, capsys):
    llmc(tmp_path / "model.bin", random_weights())
    path, data = tmp_path / "model.bin", (tmp_path / "model.bin").read_bytes()
    digest = sha256(data).hexdigest()
    if place == "hub cache":
        file = tmp_path / "blobs" / digest
        file.parent.mkdir()
        path.rename(file)
        path.symlink_to(file)
    elif place == "hub folder":
        metadata = tmp_path / ".cache" / "huggingface" / "download" / "model.bin.metadata"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"{'0' * 40}\n{digest}\n1700000000.0\n")
    else:
        (tmp_path / place).write_text(f"{'0' * 64}  another.bin\n{digest} *model.bin\n")
    assert main([str(path), str(tmp_path / "right")]) == 0
    assert "no checksum" not in capsys.readouterr().out
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    assert_refused([str(path)], tmp_path / "out", r"\S+model\.bin has the SHA-256 \w+", capsys)


def test_values_too_large_for_half_precision(tmp_path, capsys):
    def enlarge(state, name):
        state[name] = state[name].clone()
        state[name][0, 0] = 1e6

    arguments = write_source("hf", tmp_path / "source", enlarge)
    message = r"\S+2\.\S+weight has values past the 6\.55e\+04 that torch\.float16 holds"
    assert_refused([*arguments, "--dtype", "float16"], tmp_path / "out", message, capsys)
    assert main([*arguments, str(tmp_path / "out"), "--dtype", "bfloat16", "--no-verify"]) == 0


@pytest.mark.parametrize("layout", ["safetensors", "sharded bin"])
def test_two_tensors_of_one_name_are_refused(layout, tmp_path, capsys, logged_warnings):
    def double(tensors):
        return tensors | {"h.2.ln_1.bias": torch.zeros(32)}

    hf_source(tmp_path / "source", layout, double)
    message = r"\S+: (transformer\.)?h\.2\.ln_1\.bias and \S+: \S+ are both h\.2\.ln_1\.bias"
    assert_refused([str(tmp_path / "source")], tmp_path / "out", message, capsys)


ODD_FIELDS = [("n_embd", "x"), ("n_embd", None), ("n_embd", 64), ("n_head", 0), ("n_head", 3.0)]
ODD_FIELDS += [("eos_token_id", []), ("eos_token_id", "x"), ("n_positions", -1), ("n_layer", 10**9)]


@pytest.mark.parametrize(("name", "value"), ODD_FIELDS)
def test_odd_fields_of_a_config_are_refused(name, value, small_gpt2, tmp_path, capsys):
    shutil.copytree(small_gpt2, tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    message = rf".*({re.escape(str(path))}: \S+|has shape|too few for 10+ layers)"
    assert_refused([str(tmp_path / "source")], tmp_path / "out", message, capsys)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "[" * 100_000),
        ("config.json", "[]"),
        ("model.safetensors.index.json", "[" * 100_000),
        ("model.safetensors.index.json", '{"weight_map": {"a": 5}}'),
        ("model.safetensors.index.json", '{"weight_map": null}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../model.safetensors"}}'),
    ],
)
def test_damaged_json(name, text, small_gpt2, tmp_path, capsys):
    shutil.copytree(small_gpt2, tmp_path / "source")
    if name != "config.json":
        (tmp_path / "source" / "model.safetensors").unlink()
    (tmp_path / "source" / name).write_text(text)
    message = rf".*{re.escape(str(tmp_path / 'source' / name))}"
    assert_refused([str(tmp_path / "source")], tmp_path / "out", message, capsys)


ODD_ARGUMENTS = [("n_head", "2"), ("n_head", 0), ("block_size", None), ("dropout", "much")]
ODD_ARGUMENTS += [("n_embd", -16), ("vocab_size", 10**30), ("vocab_size", 61)]


@pytest.mark.parametrize(("argument", "value"), ODD_ARGUMENTS)
def test_odd_arguments_of_nanogpt_are_refused(argument, value, tmp_path, capsys):
    nanogpt(tmp_path / "ckpt.pt", random_weights())
    content = torch.load(tmp_path / "ckpt.pt")
    content["model_args"][argument] = value
    torch.save(content, tmp_path / "ckpt.pt")
    assert_refused([str(tmp_path)], tmp_path / "out", r"\S+ckpt\.pt: \S+", capsys)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (0, torch.ones(2), "0 is a view; a state dict has dense tensors by name"),
        ("final_norm.scale", 5, r"final_norm\.scale is a int"),
        ("trf_blocks.0.ff.layers.0.weight", torch.tensor(1.0), r"\S+ has shape \[\], and the conf"),
        ("final_norm.scale", torch.ones(16).to_sparse(), r"\S+scale is a \S+sparse_tensor"),
        ("final_norm.scale", torch.ones(16, device="meta"), r"\S+scale is a \S+meta_tensor"),
        ("final_norm.scale", torch.ones(16).to(torch.float8_e4m3fn), r"\S+scale holds \S+float8"),
        ("final_norm.scale", torch.ones(16, dtype=torch.complex64), r"\S+scale holds \S+complex"),
        ("\x1b[2Jevil\nname", torch.ones(1), r"has tensors that GPT-2 has not: \\x1b\[2Jevil name"),
    ],
)
def test_odd_entries_of_a_state_dict_are_refused(name, value, message, tmp_path, capsys):
    textbook(tmp_path / "model.pth", random_weights())
    torch.save(torch.load(tmp_path / "model.pth") | {name: value}, tmp_path / "model.pth")
    arguments = [str(tmp_path / "model.pth"), "--num-heads", "2"]
    assert_refused(arguments, tmp_path / "out", rf"\S+model\.pth:? {message}", capsys)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archives_that_were_packed_anew(compression, tmp_path, capsys):
    weights = random_weights()
    textbook(tmp_path / "model.pth", weights)
    old, path = zipfile.ZipFile(tmp_path / "model.pth"), tmp_path / "again.pth"
    with old, zipfile.ZipFile(path, "w", compression) as new:
        for name in sorted(old.namelist()):
            new.writestr(name, old.read(name))
    if compression == zipfile.ZIP_DEFLATED:
        arguments, message = (
            [str(path), "--num-heads", "2"],
            r"\S+again\.pth \S.*data\S+ is compressed",
        )
        assert_refused(arguments, tmp_path / "out", message, capsys)
    else:
        expected = partial(forward, weights, gelu="tanh")
        assert_converts(path, tmp_path / "out", expected, "--num-heads", "2")
