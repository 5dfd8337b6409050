"""Every format becomes the same model as by an independent implementation, and can leave again."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel, GPT2TokenizerFast

from hf_scratch_gpt import ScratchGPTForCausalLM, ScratchGPTTokenizer
from hf_scratch_gpt.checkpoints.hf_gpt2 import read_hf_gpt2
from hf_scratch_gpt.checkpoints.state_dicts import read_weights

from ..commands import convert as main
from ..commands import export as export
from ..commands import verify as verify
from ..models import random_gpt2
from .checkpoints import (
    HEADS,
    LAYERS,
    VOCABULARY,
    WIDTH,
    assert_converts,
    assert_refused,
    bare,
    forward,
    hf_source,
    llmc,
    nanogpt,
    random_weights,
    textbook,
    with_masks,
    write_source,
)


@pytest.mark.parametrize(
    ("bias", "prefix"), [(True, ""), (False, "_orig_mod."), (True, "_orig_mod.module.")]
)
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


@pytest.mark.parametrize(
    ("tied", "qkv_bias", "wrapped"),
    [(True, True, False), (False, False, True), (True, False, True), (False, True, False)],
)
def test_textbook(tied, qkv_bias, wrapped, tmp_path):
    weights, path = random_weights(), tmp_path / "model.pth"
    for layer in range(LAYERS):
        weights[f"{layer}.qkv.b"] *= qkv_bias
    head = None if tied else torch.randn(VOCABULARY, WIDTH) * 0.2
    textbook(path, weights, head, qkv_bias, wrapped)

    def expected(ids):
        return forward(weights, ids, "tanh", head)

    model = assert_converts(path, tmp_path / "out", expected, "--num-heads", str(HEADS))
    assert (model.config.tie_word_embeddings, model.config.qkv_bias) == (tied, qkv_bias)


def test_textbook_heads_that_are_assumed_or_published(tmp_path, capsys):
    state = {"tok_emb.weight": torch.zeros(3, 768), "pos_emb.weight": torch.zeros(4, 768)}
    torch.save(state, tmp_path / "model.pth")
    opened = read_weights(str(tmp_path / "model.pth"))
    assert opened.origin == "textbook state dict, 12 heads assumed from the width 768"
    arguments = [str(tmp_path / "model.pth"), "--preset", "gpt2-medium"]
    message = r"\S+model\.pth has 1 layers of width 768, and gpt2-medium has 24 of width 1024"
    assert_refused(arguments, tmp_path / "out", message, capsys)


@pytest.mark.parametrize("version", [3, 5])
def test_llmc(version, tmp_path, capsys):
    dtype = {3: torch.float32, 5: torch.bfloat16}[version]
    weights = {name: tensor.to(dtype).float() for name, tensor in random_weights().items()}
    llmc(tmp_path / "model.bin", weights, version)
    model = assert_converts(
        tmp_path / "model.bin", tmp_path / "out", lambda ids: forward(weights, ids, "tanh")
    )
    assert model.config.vocab_size == VOCABULARY
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert torch.equal(stored["model.layers.2.mlp.up_proj.weight"].float(), weights["2.fc.w"])
    assert "model.bin has no checksum" in capsys.readouterr().out


def test_a_vocabulary_from_elsewhere(openai_tiny, tmp_path, capsys):
    weights = random_weights(vocabulary=400)
    nanogpt(tmp_path / "ckpt.pt", weights, vocabulary=400)
    arguments = [str(tmp_path / "ckpt.pt"), str(tmp_path / "out"), "--tokenizer", str(openai_tiny)]
    assert main(arguments) == 0
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 400
    nanogpt(tmp_path / "small.pt", random_weights())
    assert main([str(tmp_path / "small.pt"), str(tmp_path / "small"), *arguments[2:]]) == 2
    assert "vocabulary has 400 tokens, and the model" in capsys.readouterr().err


@torch.no_grad()
def test_round_trip_is_exact_and_the_export_is_gpt2s(
    openai_tiny, converted_tiny, tiny_tokenizer, tmp_path
):
    assert export([str(converted_tiny), str(tmp_path / "theirs")]) == 0
    assert main([str(tmp_path / "theirs"), str(tmp_path / "again")]) == 0
    folders = (converted_tiny, tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert isinstance(tokenizer, GPT2TokenizerFast)
    assert tokenizer("Hello 😀").input_ids == tiny_tokenizer("Hello 😀").input_ids
    assert verify([str(openai_tiny), str(converted_tiny)]) == 0


def test_mixed_data_types_lose_nothing(tmp_path):
    def halve(state, name):
        state[name] = state[name].half()

    arguments = write_source("hf", tmp_path / "source", halve)
    assert main([*arguments, str(tmp_path / "out")]) == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def untie(tensors):
    """A head that differs, though the configuration ties it."""
    return tensors | {"lm_head.weight": torch.randn(97, 32) * 0.2}


@torch.no_grad()
@pytest.mark.parametrize(
    ("layout", "form"),
    [
        ("safetensors", bare),
        ("safetensors", untie),
        ("bin", with_masks),
        ("old bin", dict),
        ("sharded safetensors", with_masks),
        ("sharded bin", dict),
    ],
)
def test_forms_of_transformers_gpt2(layout, form, tmp_path, logged_warnings):
    source = tmp_path / "source"
    theirs = hf_source(source, layout, form)
    model = assert_converts(source, tmp_path / "out", lambda ids: theirs(ids).logits)
    loaded, report = ScratchGPTForCausalLM.from_pretrained(source, output_loading_info=True)
    assert not any(report.values())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.get_parameter(name)), name


def test_special_tokens_come_from_the_vocabulary(openai_tiny, tmp_path):
    tokens = dict(bos_token_id=5, eos_token_id=None, pad_token_id=None)
    random_gpt2(vocab_size=400, **tokens).save_pretrained(tmp_path)
    for theirs, ours in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copy(openai_tiny / theirs, tmp_path / ours)
    opened = read_hf_gpt2(str(tmp_path))
    config = opened.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (5, 399, 399)
    assert opened.tokenizer.model_max_length == config.max_position_embeddings
    tokenizer = ScratchGPTTokenizer.from_pretrained(openai_tiny, model_max_length=7)
    opened.adopt(tokenizer)
    assert (opened.tokenizer, tokenizer.model_max_length) == (tokenizer, 7)


@torch.no_grad()
def test_a_kernel_that_is_not_here_stops_no_conversion(small_gpt2, tmp_path):
    theirs = GPT2LMHeadModel.from_pretrained(small_gpt2)
    shutil.copytree(small_gpt2, tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    fields = json.loads(path.read_text()) | {"attn_implementation": "flash_attention_2"}
    path.write_text(json.dumps(fields))
    assert_converts(tmp_path / "source", tmp_path / "out", lambda ids: theirs(ids).logits)
