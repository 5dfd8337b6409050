"""Quantisers: which layers they find, and what the model computes with the weights they kept."""

import bitsandbytes
import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from hf_scratch_gpt import ScratchGPTForCausalLM

from ..models import random_ids

LAYERS = 2


def linear_layers(model: nn.Module, kind: type = nn.Linear) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


@pytest.fixture(scope="module")
def plain(ours):
    return ScratchGPTForCausalLM.from_pretrained(ours).eval()


@torch.no_grad()
def distance(model, plain, weights) -> float:
    """Between logits and those of the plain model with the weights that the quantiser kept."""
    ids, expected = random_ids(2, 20), type(plain)(plain.config).eval()
    expected.load_state_dict(plain.state_dict())
    for name, weight in weights.items():
        expected.get_submodule(name).weight.copy_(weight)
    return (model(ids).logits.float() - expected(ids).logits).abs().max().item()


def test_bitsandbytes_finds_the_layers_that_it_finds_in_llama(ours, plain, tmp_path, record):
    sizes = dict(vocab_size=400, hidden_size=32, intermediate_size=128, num_attention_heads=4)
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=LAYERS)).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True)
    model, llama = (
        loader.from_pretrained(folder, quantization_config=config, device_map="cpu")
        for loader, folder in [(ScratchGPTForCausalLM, ours), (LlamaForCausalLM, tmp_path)]
    )
    found, in_llama = (linear_layers(m, bitsandbytes.nn.Linear4bit) for m in (model, llama))
    gates = {f"model.layers.{layer}.mlp.gate_proj" for layer in range(LAYERS)}
    assert found == in_llama - gates  # a gate is all that Llama has beyond ours
    parts = {name: model.get_submodule(name).weight for name in found}
    unpacked = {
        name: bitsandbytes.functional.dequantize_4bit(weight, weight.quant_state)
        for name, weight in parts.items()
    }
    assert distance(model, plain, unpacked) < 1e-3
    record("bitsandbytes", "layers in 4 bits, with Llama's but its gates", f"{len(found)} of 12")


@pytest.mark.clients
def test_torchao_at_load(ours, plain, record):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    model = ScratchGPTForCausalLM.from_pretrained(ours, quantization_config=config)
    found = linear_layers(model.model)
    weights = {name: model.model.get_submodule(name).weight for name in found}
    assert all(type(weight).__name__ == "Int8Tensor" for weight in weights.values())
    kept = {f"model.{name}": weight.dequantize() for name, weight in weights.items()}
    far = distance(model, plain, kept)
    assert far < 1e-3
    record(
        "torchao",
        "int8 at load: layers, logits with the weights kept",
        f"12 of {len(found)}, {far:.0e}",
    )


@pytest.mark.clients
def test_quanto(ours, plain, record):
    from optimum import quanto

    model = ScratchGPTForCausalLM.from_pretrained(ours).eval()
    quanto.quantize(model, weights=quanto.qint8, exclude="lm_head")
    quanto.freeze(model)
    found = linear_layers(model, quanto.QLinear)
    assert found == linear_layers(plain) - {"lm_head"}
    kept = {name: model.get_submodule(name).weight.dequantize() for name in found}
    far = distance(model, plain, kept)
    assert far < 1e-3
    record(
        "optimum-quanto",
        "int8: layers, logits with the weights kept",
        f"{len(found)} of 12, {far:.0e}",
    )
