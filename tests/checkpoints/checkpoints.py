"""Checkpoints of every format, each written by a few lines from its public description."""

import json
import os
import re
import struct

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from hf_scratch_gpt import ScratchGPTForCausalLM
from hf_scratch_gpt.checkpoints.bundled import BUNDLED

from ..commands import convert as main
from ..models import random_gpt2
from .releases import change_release

LAYERS, HEADS, WIDTH, POSITIONS, VOCABULARY = 3, 2, 16, 24, 60
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
    names = {f"{n}.{short}": f"h.{n}.{names[short]}" for n in range(LAYERS) for short in names}
    state = {"transformer.wte.weight": weights["tok"], "transformer.wpe.weight": weights["pos"]}
    state["lm_head.weight"] = weights["tok"]
    for short, name in (names | {"lnf": "ln_f"}).items():
        state[f"transformer.{name}.weight"] = weights[f"{short}.w"]
        if bias:
            state[f"transformer.{name}.bias"] = weights[f"{short}.b"]
    for layer in range(LAYERS):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, POSITIONS, POSITIONS).tril()
    arguments = dict(n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, block_size=POSITIONS)
    arguments |= dict(bias=bias, vocab_size=vocabulary, dropout=0.0)
    model = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({"model": model, "model_args": arguments, "iter_num": 5, "config": {}}, path)


def textbook(path, weights, head=None, qkv_bias=True, wrapped=False):
    state = {"tok_emb.weight": nn.Parameter(weights["tok"]), "pos_emb.weight": weights["pos"]}
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
    order = [F.pad(weights["tok"], (0, 0, 0, padded - VOCABULARY)), weights["pos"]]
    for name in ("ln1", "qkv", "proj", "ln2", "fc", "back"):
        for kind in "wb":
            order += [weights[f"{layer}.{name}.{kind}"] for layer in range(LAYERS)]
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


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch /tmp/this-must-not-exist",)


def write_source(kind, folder, change=lambda state, name: None):
    """A source of `kind` whose state dict `change` has spoilt; the arguments that convert it."""
    if kind == "openai":
        change_release(BUNDLED, folder, lambda tensors: change(tensors, "model/h2/mlp/c_fc/w"))
        return [str(folder)]
    if kind in ("hf", "hf pickle"):
        layout = "bin" if kind == "hf pickle" else "safetensors"
        write_hf(folder, layout, lambda tensors: change(tensors, "transformer.h.2.mlp.c_fc.weight"))
        return [str(folder)]
    folder.mkdir()
    path, write, name = folder / "ckpt.pt", nanogpt, "transformer.h.2.mlp.c_fc.weight"
    if kind == "textbook":
        path, write, name = folder / "model.pth", textbook, "trf_blocks.2.ff.layers.0.weight"
    write(path, random_weights())
    content = torch.load(path)
    change(content.get("model", content), name)
    torch.save(content, path)
    return [str(folder)] if kind == "nanogpt" else [str(path), "--num-heads", "2"]


def add(state, name):
    state |= {f"{name}{number}": torch.ones(3) for number in range(8)}


def misshape(state, name):
    state[name] = state[name][..., :-1].clone()


def poison(state, name):
    state[name] = state[name].clone()
    state[name].view(-1)[0] = float("nan")


KINDS = ["hf", "hf pickle", "nanogpt", "textbook"]


def assert_refused(arguments, out, message, capsys):
    assert main([arguments[0], str(out), *arguments[1:]]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(rf"error: .*{message}", error), error
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}-*"))


def bare(tensors):
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def with_masks(tensors):
    masks = {}
    for layer in range(LAYERS):
        masks[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24).tril().bool()
        masks[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return tensors | masks


def write_hf(folder, layout, change=lambda tensors: None):
    """Write a random GPT-2 to `folder`, its state dict as `change` returns or leaves it."""
    random_gpt2(n_layer=LAYERS).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    (folder / "model.safetensors").unlink()
    suffix = "bin" if layout.endswith("bin") else "safetensors"
    stem = "pytorch_model" if suffix == "bin" else "model"
    shards = {f"{stem}.{suffix}": list(tensors)}
    if layout.startswith("sharded"):
        names = list(tensors)
        shards = {f"{stem}-0000{n + 1}-of-00002.{suffix}": names[n::2] for n in range(2)}
        index = {name: file for file, members in shards.items() for name in members}
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / f"{stem}.{suffix}.index.json").write_text(text)
    for file, members in shards.items():
        part = {name: tensors[name] for name in members}
        if suffix == "bin":  # an archive since PyTorch 1.6
            is_archive = not layout.startswith("old")
            torch.save(part, folder / file, _use_new_zipfile_serialization=is_archive)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})


def hf_source(folder, layout, form=dict):
    """A random GPT-2 at `folder`, its state dict changed by `form`; the model."""
    write_hf(folder, layout, form)
    return GPT2LMHeadModel.from_pretrained(folder).eval()
