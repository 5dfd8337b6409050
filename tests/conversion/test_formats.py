"""Every format, written here by an independent few lines from its public description."""

import json
import os
import pickle
import re
import shutil
import struct
import zipfile
import zlib
from hashlib import sha256

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoTokenizer, GPT2LMHeadModel, GPT2TokenizerFast

from conversion.convert_gpt2 import main
from conversion.export_gpt2 import main as export
from conversion.hf_gpt2 import read_hf_gpt2
from conversion.tensor_bundle import TensorBundle
from conversion.textbook import read_textbook
from conversion.verify import main as verify
from hf_scratch_gpt import ScratchGPTForCausalLM, ScratchGPTTokenizer

from ..models import random_gpt2
from .releases import write_checkpoint

LAYERS, HEADS, WIDTH, POSITIONS, VOCABULARY = 11, 2, 16, 24, 60
LINEARS = {"qkv": (48, 16), "proj": (16, 16), "fc": (64, 16), "back": (16, 64)}


def random_weights(bias=True, vocabulary=VOCABULARY):
    """Weights of a GPT by short names; matrices are (outputs, inputs)."""
    weights = {
        "tok": torch.randn(vocabulary, WIDTH) * 0.2,
        "pos": torch.randn(POSITIONS, WIDTH) * 0.2,
    }
    for layer in range(LAYERS):
        for name, shape in LINEARS.items():
            weights[f"{layer}.{name}.w"] = torch.randn(shape) * 0.2
            weights[f"{layer}.{name}.b"] = torch.randn(shape[0]) * 0.2 * bias
        for name in ("ln1", "ln2"):
            weights[f"{layer}.{name}.w"] = 1 + torch.randn(WIDTH) * 0.2
            weights[f"{layer}.{name}.b"] = torch.randn(WIDTH) * 0.2 * bias
    weights["lnf.w"] = 1 + torch.randn(WIDTH) * 0.2
    weights["lnf.b"] = torch.randn(WIDTH) * 0.2 * bias
    return weights


def forward(weights, ids, gelu, head=None):
    """Logits by the formulas of the paper."""

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), weights[f"{name}.w"], weights[f"{name}.b"])

    def linear(x, name):
        return x @ weights[f"{name}.w"].T + weights[f"{name}.b"]

    x = weights["tok"][ids] + weights["pos"][: ids.shape[1]]
    for layer in range(LAYERS):
        q, k, v = linear(norm(x, f"{layer}.ln1"), f"{layer}.qkv").split(WIDTH, dim=-1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, k, v))
        scores = (q @ k.mT / (WIDTH // HEADS) ** 0.5).masked_fill(
            torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool(), float("-inf")
        )
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{layer}.proj")
        hidden = F.gelu(linear(norm(x, f"{layer}.ln2"), f"{layer}.fc"), approximate=gelu)
        x = x + linear(hidden, f"{layer}.back")
    return norm(x, "lnf") @ (weights["tok"] if head is None else head).T


def nanogpt(path, weights, bias=True, prefix="", vocabulary=VOCABULARY):
    names = {"qkv": "attn.c_attn", "proj": "attn.c_proj", "fc": "mlp.c_fc", "back": "mlp.c_proj"}
    names |= {"ln1": "ln_1", "ln2": "ln_2"}
    state = {"transformer.wte.weight": weights["tok"], "transformer.wpe.weight": weights["pos"]}
    state["lm_head.weight"] = weights["tok"]
    for layer in range(LAYERS):
        for short, name in names.items():
            state[f"transformer.h.{layer}.{name}.weight"] = weights[f"{layer}.{short}.w"]
            state[f"transformer.h.{layer}.{name}.bias"] = weights[f"{layer}.{short}.b"]
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, POSITIONS, POSITIONS).tril()
    state["transformer.ln_f.weight"] = weights["lnf.w"]
    state["transformer.ln_f.bias"] = weights["lnf.b"]
    if not bias:
        state = {
            n: t for n, t in state.items() if not n.endswith("bias") or n.endswith(".attn.bias")
        }
    arguments = dict(n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, block_size=POSITIONS)
    arguments |= dict(bias=bias, vocab_size=vocabulary, dropout=0.0)
    model = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({"model": model, "model_args": arguments, "iter_num": 5, "config": {}}, path)


def textbook(path, weights, head=None, qkv_bias=True, wrapped=False):
    state = {"tok_emb.weight": weights["tok"], "pos_emb.weight": weights["pos"]}
    for layer in range(LAYERS):
        block = f"trf_blocks.{layer}."
        for kind, short in (("weight", "w"), ("bias", "b")):
            parts = weights[f"{layer}.qkv.{short}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                if kind == "weight" or qkv_bias:
                    state[f"{block}att.W_{name}.{kind}"] = part.clone()
            state[f"{block}att.out_proj.{kind}"] = weights[f"{layer}.proj.{short}"]
            state[f"{block}ff.layers.0.{kind}"] = weights[f"{layer}.fc.{short}"]
            state[f"{block}ff.layers.2.{kind}"] = weights[f"{layer}.back.{short}"]
        for kind, short in (("scale", "w"), ("shift", "b")):
            state[f"{block}norm1.{kind}"] = weights[f"{layer}.ln1.{short}"]
            state[f"{block}norm2.{kind}"] = weights[f"{layer}.ln2.{short}"]
        state[f"{block}att.mask"] = torch.ones(POSITIONS, POSITIONS).triu(1)
    state["final_norm.scale"], state["final_norm.shift"] = weights["lnf.w"], weights["lnf.b"]
    state["out_head.weight"] = weights["tok"] if head is None else head
    torch.save({"model_state_dict": state} if wrapped else state, path)


def llmc(path, weights, version=3, padded=64):
    dtype = {3: torch.float32, 5: torch.bfloat16}[version]
    header = [20240326, version, POSITIONS, VOCABULARY, LAYERS, HEADS, WIDTH, padded]
    rows = F.pad(weights["tok"], (0, 0, 0, padded - VOCABULARY))
    order = [rows, weights["pos"]]
    for name in ("ln1.w", "ln1.b", "qkv.w", "qkv.b", "proj.w", "proj.b", "ln2.w", "ln2.b"):
        order += [weights[f"{layer}.{name}"] for layer in range(LAYERS)]
    for name in ("fc.w", "fc.b", "back.w", "back.b"):
        order += [weights[f"{layer}.{name}"] for layer in range(LAYERS)]
    order += [weights["lnf.w"], weights["lnf.b"]]
    data = b"".join(t.to(dtype).view(torch.uint8).contiguous().numpy().tobytes() for t in order)
    path.write_bytes(struct.pack("256i", *header, *[0] * (256 - len(header))) + data)


@torch.no_grad()
def assert_converts(source, out, expected, *arguments):
    """The converted model gives the logits `expected(ids)`."""
    assert main([str(source), str(out), *arguments]) == 0
    model = ScratchGPTForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.randint(0, model.config.vocab_size, (2, 20))
    torch.testing.assert_close(model(ids).logits, expected(ids), atol=1e-5, rtol=0)
    return model


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "_orig_mod.module."])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt(bias, prefix, tmp_path):
    weights = random_weights(bias)
    nanogpt(tmp_path / "ckpt.pt", weights, bias, prefix)
    model = assert_converts(tmp_path, tmp_path / "out", lambda ids: forward(weights, ids, "none"))
    assert model.config.qkv_bias is bias


def test_nanogpts_padding_is_cut_off(tmp_path, capsys):
    weights = random_weights(vocabulary=50304)
    nanogpt(tmp_path / "ckpt.pt", weights, vocabulary=50304)

    def expected(ids):
        return forward(weights, ids, "none")[..., :50257]

    model = assert_converts(tmp_path / "ckpt.pt", tmp_path / "out", expected)
    assert (model.config.vocab_size, model.config.eos_token_id) == (50257, 50256)
    assert "last 47 rows: padding of the vocabulary" in capsys.readouterr().out


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_textbook(tied, qkv_bias, wrapped, tmp_path):
    weights = random_weights()
    if not qkv_bias:
        for layer in range(LAYERS):
            weights[f"{layer}.qkv.b"].zero_()
    head = None if tied else torch.randn(VOCABULARY, WIDTH) * 0.2
    textbook(tmp_path / "model.pth", weights, head, qkv_bias, wrapped)
    model = assert_converts(
        tmp_path / "model.pth",
        tmp_path / "out",
        lambda ids: forward(weights, ids, "tanh", head),
        "--num-heads",
        str(HEADS),
    )
    assert (model.config.tie_word_embeddings, model.config.qkv_bias) == (tied, qkv_bias)


def test_textbook_heads_that_are_assumed_or_published(tmp_path, capsys):
    state = {"tok_emb.weight": torch.zeros(3, 768), "pos_emb.weight": torch.zeros(4, 768)}
    torch.save(state, tmp_path / "model.pth")
    opened = read_textbook(str(tmp_path / "model.pth"))
    assert opened.origin == "textbook state dict, 12 heads assumed from the width 768"
    arguments = [str(tmp_path / "model.pth"), "--preset", "gpt2-medium"]
    message = r"\S+model\.pth has 1 layers of width 768, and gpt2-medium has 24 of width 1024"
    assert_refused(arguments, tmp_path / "out", message, capsys)


def test_textbook_needs_the_number_of_heads(tmp_path, capsys):
    textbook(tmp_path / "model.pth", random_weights())
    assert main([str(tmp_path / "model.pth"), str(tmp_path / "out")]) == 1
    assert "pass --num-heads or --preset" in capsys.readouterr().err


@pytest.mark.parametrize("version", [3, 5])
def test_llmc(version, tmp_path):
    dtype = {3: torch.float32, 5: torch.bfloat16}[version]
    weights = {name: tensor.to(dtype).float() for name, tensor in random_weights().items()}
    llmc(tmp_path / "model.bin", weights, version)
    model = assert_converts(
        tmp_path / "model.bin", tmp_path / "out", lambda ids: forward(weights, ids, "tanh")
    )
    assert model.config.vocab_size == VOCABULARY
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert torch.equal(stored["model.layers.3.mlp.up_proj.weight"].float(), weights["3.fc.w"])


def test_a_vocabulary_from_elsewhere(openai_tiny, tmp_path, capsys):
    weights = random_weights(vocabulary=400)
    nanogpt(tmp_path / "ckpt.pt", weights, vocabulary=400)
    arguments = [str(tmp_path / "ckpt.pt"), str(tmp_path / "out"), "--tokenizer", str(openai_tiny)]
    assert main(arguments) == 0
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 400
    nanogpt(tmp_path / "small.pt", random_weights())
    assert main([str(tmp_path / "small.pt"), str(tmp_path / "small"), *arguments[2:]]) == 1
    assert "vocabulary has 400 tokens, and the model" in capsys.readouterr().err


@torch.no_grad()
def test_round_trip_is_exact_and_the_export_is_gpt2s(openai_tiny, tmp_path):
    assert main([str(openai_tiny), str(tmp_path / "ours")]) == 0
    assert export([str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 0
    assert main([str(tmp_path / "theirs"), str(tmp_path / "again")]) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "again"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name

    ids = torch.randint(0, 400, (2, 20))
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "theirs")
    ours = ScratchGPTForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-5, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert isinstance(tokenizer, GPT2TokenizerFast)
    assert (
        tokenizer("Hello 😀").input_ids
        == AutoTokenizer.from_pretrained(tmp_path / "ours")("Hello 😀").input_ids
    )
    assert verify([str(openai_tiny), str(tmp_path / "ours")]) == 0


def test_export_of_an_untied_model_without_biases(tmp_path):
    weights, head = random_weights(), torch.randn(VOCABULARY, WIDTH)
    textbook(tmp_path / "model.pth", weights, head, qkv_bias=False)
    assert main([str(tmp_path / "model.pth"), str(tmp_path / "ours"), "--num-heads", "2"]) == 0
    assert export([str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 0
    ids = torch.randint(0, VOCABULARY, (2, 20))
    with torch.no_grad():
        expected = ScratchGPTForCausalLM.from_pretrained(tmp_path / "ours")(ids).logits
        logits = GPT2LMHeadModel.from_pretrained(tmp_path / "theirs")(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_verification_notices_another_model(openai_tiny, tmp_path, capsys):
    assert main([str(openai_tiny), str(tmp_path / "out")]) == 0
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] += 0.01
    save_file(tensors, path, metadata={"format": "pt"})
    assert verify([str(openai_tiny), str(tmp_path / "out")]) == 1
    assert "the conversion is wrong" in capsys.readouterr().err


# Bad sources, by format. A state dict is spoilt before it is written, a file afterwards.


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch /tmp/this-must-not-exist",)


def write_source(kind, folder, change):
    """A source of `kind` whose state dict `change` has spoilt; the arguments that convert it."""
    folder.mkdir()
    if kind == "hf":
        random_gpt2(n_layer=LAYERS).save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors, "transformer.h.10.mlp.c_fc.weight")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return [str(folder)]
    if kind == "hf pickle":
        random_gpt2(n_layer=LAYERS).save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        change(tensors, "transformer.h.10.mlp.c_fc.weight")
        torch.save(tensors, folder / "pytorch_model.bin")
        return [str(folder)]
    if kind == "nanogpt":
        nanogpt(folder / "ckpt.pt", random_weights())
        content = torch.load(folder / "ckpt.pt")
        change(content["model"], "transformer.h.10.mlp.c_fc.weight")
        torch.save(content, folder / "ckpt.pt")
        return [str(folder)]
    textbook(folder / "model.pth", random_weights())
    content = torch.load(folder / "model.pth")
    change(content, "trf_blocks.10.ff.layers.0.weight")
    torch.save(content, folder / "model.pth")
    return [str(folder / "model.pth"), "--num-heads", "2"]


def nothing(state, name):
    pass


def remove(state, name):
    del state[name]


def add(state, name):
    state[f"{name}.surprise"] = torch.ones(3)


def misshape(state, name):
    state[name] = state[name][:-1].clone()


def poison(state, name):
    state[name] = state[name].clone()
    state[name][0, 0] = float("nan")


SPOILT = {
    "missing tensor": (remove, r"lacks the tensors \S*10\.\S+weight"),
    "extra tensor": (add, r"has tensors that GPT-2 has not: \S+surprise"),
    "wrong shape": (misshape, r"\S+10\.\S+weight has shape \[\d+, \d+\], and the configuration"),
    "NaN": (poison, r"\S+10\.\S+weight holds NaN or infinity"),
}
KINDS = ["hf", "hf pickle", "nanogpt", "textbook"]


def assert_refused(arguments, out, message, capsys):
    assert main([arguments[0], str(out), *arguments[1:]]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(rf"error: .*{message}", error), error
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}-*"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_tensors_are_refused(case, kind, tmp_path, capsys):
    change, message = SPOILT[case]
    arguments = write_source(kind, tmp_path / "source", change)
    assert_refused(arguments, tmp_path / "out", message, capsys)


def weight_file(folder):
    return max(
        (path for path in folder.iterdir() if path.suffix != ".json"),
        key=lambda path: path.stat().st_size,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "damage", ["cut", "text", "empty", "flipped bit", "runs code", "archive runs code"]
)
def test_damaged_files_are_refused(damage, kind, tmp_path, capsys):
    arguments = write_source(kind, tmp_path / "source", nothing)
    path = weight_file(tmp_path / "source")
    data = path.read_bytes()
    if damage == "flipped bit" and kind == "hf":
        # The format has no checksum of its own.
        (path.parent / "SHA256SUMS").write_text(f"{sha256(data).hexdigest()}  {path.name}\n")
        data = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
    elif damage == "flipped bit":
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
            place = data.index(archive.read(largest)[:64])
        data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    elif damage == "runs code":
        data = pickle.dumps({"model": RunsCode(), "tok_emb.weight": RunsCode()})
    elif damage == "archive runs code":
        torch.save({"model": RunsCode(), "tok_emb.weight": RunsCode()}, path)
        data = path.read_bytes()
    else:
        data = {"cut": data[: len(data) // 2], "text": b"Hello, world!\n" * 50, "empty": b""}[
            damage
        ]
    path.write_bytes(data)
    assert_refused(arguments, tmp_path / "out", rf"\S*{path.name}", capsys)
    assert not os.path.exists("/tmp/this-must-not-exist")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-100], r"model\.bin has \d+ bytes, and the sizes in its header take"),
        (lambda data: data + b"xxxx", r"model\.bin has \d+ bytes"),
        (lambda data: data[:4] + struct.pack("i", 7) + data[8:], r"version 7; versions 3 and 5"),
        (lambda data: data[:16] + struct.pack("i", -3) + data[20:], r"num_hidden_layers=-3"),
        (
            lambda data: data[:16] + struct.pack("i", 1 << 30) + data[20:],
            r"model\.bin has \d+ bytes",
        ),
        (
            lambda data: data[:12] + struct.pack("i", 65) + data[16:],
            r"model\.bin says that 65 of 64 rows are tokens",
        ),
        (
            lambda data: data[:20] + struct.pack("i", 0) + data[24:],
            r"model\.bin: num_attention_heads=0 is below 1",
        ),
        (lambda data: b"Hello, world!\n" * 90, r"\S+model\.bin is no file of tensors"),
        (lambda data: data[:500], r"does not begin like a checkpoint of llm\.c"),
        (
            lambda data: data[:2000] + struct.pack("f", float("nan")) + data[2004:],
            r"wte\.weight holds NaN or infinity",
        ),
    ],
    ids=[
        *("cut", "longer", "version", "negative size", "a billion layers", "too many tokens"),
        *("no heads", "text", "header cut", "NaN"),
    ],
)
def test_spoilt_llmc_files_are_refused(change, message, tmp_path, capsys):
    llmc(tmp_path / "model.bin", random_weights())
    path = tmp_path / "model.bin"
    path.write_bytes(change(path.read_bytes()))
    assert_refused([str(path)], tmp_path / "out", message, capsys)


@pytest.mark.parametrize("name", ["empty", "textfile", "binary"])
def test_sources_that_are_nothing(name, tmp_path, capsys):
    source = tmp_path / name
    if name == "empty":
        source.mkdir()
    else:
        source.write_bytes(b"just text\n" if name == "textfile" else os.urandom(5000))
    assert_refused([str(source)], tmp_path / "out", rf"\S*{name}", capsys)


def test_hf_config_that_disagrees(tmp_path, capsys):
    arguments = write_source("hf", tmp_path / "source", nothing)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "n_embd": 64}))
    assert_refused(arguments, tmp_path / "out", r"wte\.weight has shape \[97, 32\]", capsys)
    shutil.rmtree(tmp_path / "source")


def test_hf_config_of_a_billion_layers(tmp_path, capsys):
    arguments = write_source("hf", tmp_path / "source", nothing)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "n_layer": 10**9}))
    assert_refused(
        arguments, tmp_path / "out", r"\S+ has \d+ tensors, too few for 10+ layers", capsys
    )


@pytest.mark.parametrize("kind", ["nanogpt", "textbook"])
def test_sizes_that_disagree_with_the_tensors(kind, tmp_path, capsys):
    if kind == "nanogpt":
        nanogpt(tmp_path / "ckpt.pt", random_weights(), vocabulary=61)
        arguments, message = [str(tmp_path / "ckpt.pt")], r"wte\.weight has shape \[60, 16\]"
    else:
        textbook(tmp_path / "model.pth", random_weights())
        arguments = [str(tmp_path / "model.pth"), "--num-heads", "3"]
        message = r"hidden_size=16 does not divide into num_attention_heads=3"
    assert_refused(arguments, tmp_path / "out", message, capsys)


def test_whole_numbers_are_no_weights(tmp_path, capsys):
    def round_off(state, name):
        state[name] = state[name].round().int()

    arguments = write_source("hf", tmp_path / "source", round_off)
    message = r"\S+h\.10\.mlp\.c_fc\.weight holds torch\.int32; weights are floating-point"
    assert_refused(arguments, tmp_path / "out", message, capsys)


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


def test_a_file_without_checksum_is_said_to_be_trusted(tmp_path, capsys):
    llmc(tmp_path / "model.bin", random_weights())
    assert main([str(tmp_path / "model.bin"), str(tmp_path / "out")]) == 0
    assert "model.bin has no checksum" in capsys.readouterr().out


@torch.no_grad()
def test_pickles_from_before_archives(tmp_path):
    random_gpt2(n_layer=LAYERS).save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    old = path.with_name("pytorch_model.bin")
    torch.save(load_file(path), old, _use_new_zipfile_serialization=False)
    expected = GPT2LMHeadModel.from_pretrained(tmp_path / "source")
    path.unlink()
    assert_converts(tmp_path / "source", tmp_path / "out", lambda ids: expected(ids).logits)


def test_archives_that_torch_would_not_write(tmp_path, capsys):
    textbook(tmp_path / "model.pth", random_weights())
    for name, compression, byteorder, message in (
        ("packed.pth", zipfile.ZIP_DEFLATED, b"little", "is compressed"),
        ("big.pth", zipfile.ZIP_STORED, b"big", "is big-endian"),
    ):
        with (
            zipfile.ZipFile(tmp_path / "model.pth") as source,
            zipfile.ZipFile(tmp_path / name, "w", compression) as spoilt,
        ):
            for member in source.namelist():
                content = byteorder if member.endswith("byteorder") else source.read(member)
                spoilt.writestr(member, content)
        arguments = [str(tmp_path / name), "--num-heads", "2"]
        assert_refused(arguments, tmp_path / "out", rf"\S*{name}.* {message}", capsys)


def test_shards(gpt2_folder, tmp_path):
    assert main([str(gpt2_folder), str(tmp_path / "one")]) == 0
    assert main([str(gpt2_folder), str(tmp_path / "many"), "--max-shard-size", "100KB"]) == 0
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    card = (tmp_path / "many" / "README.md").read_text()
    for name in files:
        assert f"`{sha256((tmp_path / 'many' / name).read_bytes()).hexdigest()}`" in card
    one = ScratchGPTForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    many = ScratchGPTForCausalLM.from_pretrained(tmp_path / "many").state_dict()
    assert one.keys() == many.keys()
    assert all(torch.equal(many[name], tensor) for name, tensor in one.items())


def test_weights_are_laid_out_as_the_library_does(gpt2_folder, tmp_path):
    assert main([str(gpt2_folder), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    model = ScratchGPTForCausalLM.from_pretrained(gpt2_folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = load_file(tmp_path / "saved" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_values_too_large_for_half_precision(tmp_path, capsys):
    def enlarge(state, name):
        state[name] = state[name].clone()
        state[name][0, 0] = 1e6

    arguments = write_source("hf", tmp_path / "source", enlarge)
    message = r"\S+10\.\S+weight has values past the 6\.55e\+04 that torch\.float16 holds"
    assert_refused([*arguments, "--dtype", "float16"], tmp_path / "out", message, capsys)
    assert main([*arguments, str(tmp_path / "out"), "--dtype", "bfloat16", "--no-verify"]) == 0


def test_mixed_data_types_lose_nothing(tmp_path):
    def halve(state, name):
        state[name] = state[name].half()

    arguments = write_source("hf", tmp_path / "source", halve)
    assert main([*arguments, str(tmp_path / "out")]) == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


# How transformers' GPT-2 occurs.


def bare(tensors):
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def with_masks(tensors):
    masks = {}
    for layer in range(LAYERS):
        masks[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24).tril().bool()
        masks[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return tensors | masks


def hf_source(folder, layout, form=dict):
    """A random GPT-2 at `folder`, its state dict changed by `form`; the model."""
    random_gpt2(n_layer=LAYERS).save_pretrained(folder)
    tensors = form(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    suffix = "bin" if layout.endswith("bin") else "safetensors"
    stem = "pytorch_model" if suffix == "bin" else "model"
    if layout.startswith("sharded"):
        names = list(tensors)
        shards = {f"{stem}-0000{n + 1}-of-00002.{suffix}": names[n::2] for n in range(2)}
        index = {name: file for file, members in shards.items() for name in members}
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / f"{stem}.{suffix}.index.json").write_text(text)
    else:
        shards = {f"{stem}.{suffix}": list(tensors)}
    for file, members in shards.items():
        part = {name: tensors[name] for name in members}
        if suffix == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
    return GPT2LMHeadModel.from_pretrained(folder).eval()


@torch.no_grad()
@pytest.mark.parametrize("form", [dict, bare, with_masks])
@pytest.mark.parametrize("layout", ["safetensors", "bin", "sharded safetensors", "sharded bin"])
def test_forms_of_transformers_gpt2(layout, form, tmp_path, logged_warnings):
    theirs = hf_source(tmp_path / "source", layout, form)
    assert_converts(tmp_path / "source", tmp_path / "out", lambda ids: theirs(ids).logits)


@torch.no_grad()
def test_a_head_that_differs_is_kept_though_the_config_ties_it(tmp_path, logged_warnings):
    def untie(tensors):
        return tensors | {"lm_head.weight": torch.randn(97, 32) * 0.2}

    theirs = hf_source(tmp_path / "source", "safetensors", untie)
    assert theirs.config.tie_word_embeddings
    model = assert_converts(tmp_path / "source", tmp_path / "out", lambda ids: theirs(ids).logits)
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_two_tensors_of_one_name_are_refused(layout, tmp_path, capsys, logged_warnings):
    def double(tensors):
        return tensors | {"h.3.ln_1.bias": torch.zeros(32)}

    hf_source(tmp_path / "source", layout, double)
    message = r"\S+: (transformer\.)?h\.3\.ln_1\.bias and \S+: \S+ are both h\.3\.ln_1\.bias"
    assert_refused([str(tmp_path / "source")], tmp_path / "out", message, capsys)


def test_one_name_in_two_shards_is_refused(tmp_path, capsys):
    hf_source(tmp_path / "source", "sharded bin")
    first, second = sorted((tmp_path / "source").glob("*.bin"))
    torch.save(torch.load(second) | {"transformer.wte.weight": torch.zeros(97, 32)}, second)
    torch.save(torch.load(first) | {"transformer.wte.weight": torch.zeros(97, 32)}, first)
    message = r"\S+00001-of-00002\.bin: \S+ and \S+00002-of-00002\.bin: \S+ are both wte\.weight"
    assert_refused([str(tmp_path / "source")], tmp_path / "out", message, capsys)


def test_a_name_with_and_without_the_prefix_of_the_compiler(tmp_path, capsys):
    nanogpt(tmp_path / "ckpt.pt", random_weights(), prefix="_orig_mod.")
    content = torch.load(tmp_path / "ckpt.pt")
    content["model"]["transformer.ln_f.bias"] = torch.zeros(WIDTH)
    torch.save(content, tmp_path / "ckpt.pt")
    message = r"\S+: _orig_mod\.transformer\.ln_f\.bias and \S+: \S+ are both ln_f\.bias"
    assert_refused([str(tmp_path)], tmp_path / "out", message, capsys)


def test_special_tokens_come_from_the_vocabulary(openai_tiny, tmp_path):
    random_gpt2(
        vocab_size=400, bos_token_id=5, eos_token_id=None, pad_token_id=None
    ).save_pretrained(tmp_path)
    for theirs, ours in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copy(openai_tiny / theirs, tmp_path / ours)
    opened = read_hf_gpt2(str(tmp_path))
    config = opened.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (5, 399, 399)
    assert opened.tokenizer.model_max_length == config.max_position_embeddings
    tokenizer = ScratchGPTTokenizer.from_pretrained(openai_tiny, model_max_length=7)
    opened.adopt(tokenizer)
    assert (opened.tokenizer, tokenizer.model_max_length) == (tokenizer, 7)


# Configurations and indexes.

ODD_FIELDS = {
    "n_embd": ["x", None, [1]],
    "n_head": [0, 3.0],
    "eos_token_id": [[], "x"],
    "architectures": [5],
    "id2label": [5],
    "dtype": ["flaot32"],
    "check": [5],
    "n_positions": [-1],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in ODD_FIELDS.items() for value in values]
)
def test_odd_fields_of_a_config_are_refused(name, value, gpt2_folder, tmp_path, capsys):
    shutil.copytree(gpt2_folder, tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    message = rf"{re.escape(str(path))}: \S+"
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
def test_files_of_json_that_are_none(name, text, gpt2_folder, tmp_path, capsys):
    shutil.copytree(gpt2_folder, tmp_path / "source")
    if name != "config.json":
        (tmp_path / "source" / "model.safetensors").unlink()
    (tmp_path / "source" / name).write_text(text)
    message = rf".*{re.escape(str(tmp_path / 'source' / name))}"
    assert_refused([str(tmp_path / "source")], tmp_path / "out", message, capsys)


@torch.no_grad()
def test_a_kernel_that_is_not_here_stops_no_conversion(gpt2_folder, tmp_path):
    theirs = GPT2LMHeadModel.from_pretrained(gpt2_folder)
    shutil.copytree(gpt2_folder, tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    fields = json.loads(path.read_text()) | {"attn_implementation": "flash_attention_2"}
    path.write_text(json.dumps(fields))
    assert_converts(tmp_path / "source", tmp_path / "out", lambda ids: theirs(ids).logits)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("n_head", "2"),
        ("n_head", 0),
        ("block_size", None),
        ("dropout", "much"),
        ("n_embd", -16),
        ("vocab_size", 10**30),
    ],
)
def test_odd_arguments_of_nanogpt_are_refused(argument, value, tmp_path, capsys):
    nanogpt(tmp_path / "ckpt.pt", random_weights())
    content = torch.load(tmp_path / "ckpt.pt")
    content["model_args"][argument] = value
    torch.save(content, tmp_path / "ckpt.pt")
    assert_refused([str(tmp_path)], tmp_path / "out", r"\S+ckpt\.pt: \S+", capsys)


@pytest.mark.parametrize("key", ["model", "model_args"])
def test_parts_of_nanogpt_that_are_no_dictionaries(key, tmp_path, capsys):
    nanogpt(tmp_path / "ckpt.pt", random_weights())
    torch.save(torch.load(tmp_path / "ckpt.pt") | {key: 5}, tmp_path / "ckpt.pt")
    assert_refused([str(tmp_path)], tmp_path / "out", r"\S+ckpt\.pt\b", capsys)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (0, torch.ones(2), "0 is a Tensor; a state dict has tensors by name"),
        ("final_norm.scale", 5, r"final_norm\.scale is a int"),
        ("trf_blocks.0.ff.layers.0.weight", torch.tensor(1.0), r"\S+ has shape \[\], and the conf"),
        ("final_norm.scale", torch.ones(16).to_sparse(), r"\S+scale holds \S+ torch\.sparse_coo"),
        ("final_norm.scale", torch.ones(16, device="meta"), "final_norm.scale was saved from"),
        ("final_norm.scale", torch.ones(16).to(torch.float8_e4m3fn), r"\S+scale holds \S+float8"),
        ("final_norm.scale", torch.ones(16, dtype=torch.complex64), r"\S+scale holds \S+complex"),
        ("\x1b[2Jevil\nname", torch.ones(1), r"has tensors that GPT-2 has not: \\x1b\[2Jevil name"),
    ],
    ids=["number", "no tensor", "scalar", "sparse", "meta", "float8", "complex", "escape"],
)
def test_odd_entries_of_a_state_dict_are_refused(name, value, message, tmp_path, capsys):
    textbook(tmp_path / "model.pth", random_weights())
    torch.save(torch.load(tmp_path / "model.pth") | {name: value}, tmp_path / "model.pth")
    arguments = [str(tmp_path / "model.pth"), "--num-heads", "2"]
    assert_refused(arguments, tmp_path / "out", rf"\S+model\.pth:? {message}", capsys)


def repack(source, target, order=list):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in order(old.namelist()):
            new.writestr(name, old.read(name))


@pytest.mark.parametrize("order", [list, sorted])
def test_an_archive_that_was_packed_anew_is_refused(order, tmp_path, capsys):
    textbook(tmp_path / "model.pth", random_weights())
    repack(tmp_path / "model.pth", tmp_path / "again.pth", order)
    arguments = [str(tmp_path / "again.pth"), "--num-heads", "2"]
    message = r"\S+again\.pth.* packed anew.*; torch\.load and save it again"
    assert_refused(arguments, tmp_path / "out", message, capsys)


def test_a_tensor_that_claims_more_than_the_file_has_for_it_is_refused(tmp_path, capsys):
    textbook(tmp_path / "model.pth", random_weights())
    path = tmp_path / "model.pth"
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("model/data.pkl")
        old = archive.read(member)
    shape = bytes([ord("K"), POSITIONS, ord("K"), WIDTH, 0x86])
    assert old.count(shape) == 1
    new = old.replace(shape, bytes([ord("K"), POSITIONS + 9, *shape[2:]]))
    sums = [struct.pack("<I", number) for number in (member.CRC, zlib.crc32(new))]
    path.write_bytes(data.replace(old, new).replace(*sums))
    message = r"\S+model\.pth: pos_emb\.weight takes 2112 bytes, and the file has 1536 for it"
    assert_refused([str(path), "--num-heads", "2"], tmp_path / "out", message, capsys)


# OpenAI's release.


def change_release(release, folder, change):
    shutil.copytree(release, folder)
    bundle = TensorBundle(release / "model.ckpt")
    tensors = {name: bundle.tensor(name).clone() for name in bundle.shapes}
    change(tensors)
    write_checkpoint(
        folder / "model.ckpt",
        [(name, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()],
    )


def remove_many(tensors):
    for name in [name for name in tensors if "/ln_2/" in name]:
        del tensors[name]


def add_many(tensors):
    tensors |= {f"model/h2/mlp/c_fc/extra{n}": torch.ones(2) for n in range(8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors["model/h2/mlp/c_fc/w"].view(-1)[7:8].fill_(float("nan")),
            r"model/h2/mlp/c_fc/w holds NaN or infinity",
        ),
        (
            lambda tensors: tensors.pop("model/h2/mlp/c_fc/w"),
            r"lacks the tensors h\.2\.mlp\.c_fc\.weight \(model/h2/mlp/c_fc/w\)$",
        ),
        (
            remove_many,
            r"lacks the tensors h\.0\.ln_2\.weight \(model/h0/ln_2/g\), .* and 1 more$",
        ),
        (
            add_many,
            r"has tensors that GPT-2 has not: model/h2/mlp/c_fc/extra0, .*extra4 and 3 more$",
        ),
        (
            lambda tensors: tensors.update({"model/h2/mlp/c_fc/w": torch.ones(1, 3, 3)}),
            r"model/h2/mlp/c_fc/w has shape \[3, 3\], and the configuration asks for \[48, 192\]",
        ),
        (
            lambda tensors: tensors.update({"model/h2/ln_1/w": torch.ones(48)}),
            r"model/h2/ln_1/g and model/h2/ln_1/w are both h\.2\.ln_1\.weight",
        ),
    ],
    ids=["NaN", "missing", "several missing", "extra", "shape", "two of one name"],
)
def test_spoilt_openai_releases_are_refused(change, message, openai_tiny, tmp_path, capsys):
    change_release(openai_tiny, tmp_path / "source", change)
    assert_refused([str(tmp_path / "source")], tmp_path / "out", rf"\S+source.*{message}", capsys)


def test_text_in_place_of_openais_shard_is_refused(openai_tiny, tmp_path, capsys):
    shutil.copytree(openai_tiny, tmp_path / "source")
    shard = tmp_path / "source" / "model.ckpt.data-00000-of-00001"
    shard.write_bytes((b"Hello, world!\n" * shard.stat().st_size)[: shard.stat().st_size])
    message = rf"\S+{shard.name}: model/\S+ does not match its checksum"
    assert_refused([str(tmp_path / "source")], tmp_path / "out", message, capsys)
