"""Arithmetic on configurations, against models on the meta device, torch's counters and tensors."""

import random
import weakref

import pytest
import torch
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_scratch_gpt import ScratchGPTConfig, ScratchGPTForCausalLM
from hf_scratch_gpt.model.presets_scratch_gpt import PRESETS
from hf_scratch_gpt.sizing import (
    count_parameters,
    forward_flops_per_token,
    humanize_seconds,
    kv_cache_bytes,
    rule_of_thumb_flops_per_token,
    storage_bytes,
    training_flops_per_token,
    training_memory,
    training_seconds,
)

from .models import random_ids, tiny_config

COMPONENTS = {
    "token_embedding": "embed_tokens.",
    "position_embedding": "embed_positions.",
    "attention": ".self_attn.",
    "feed_forward": ".mlp.",
    "norms": "norm.",
    "output_head": "lm_head.",
}


def random_config(seed: int) -> ScratchGPTConfig:
    choose = random.Random(seed)
    heads = choose.randint(1, 8)
    sizes = dict(vocab_size=choose.randint(1, 3000), hidden_size=heads * choose.randint(1, 40))
    sizes |= dict(num_hidden_layers=choose.randint(1, 6), num_attention_heads=heads)
    sizes |= dict(intermediate_size=2 * choose.randint(0, 500) + 1)
    sizes |= dict(max_position_embeddings=choose.randint(1, 3000), qkv_bias=seed % 2 == 0)
    return ScratchGPTConfig(tie_word_embeddings=seed % 4 < 2, **sizes)


# As the paper of GPT-3 rounds them.
ROUNDED = {"gpt3-small": 125e6, "gpt3-medium": 350e6, "gpt3-large": 760e6, "gpt3-xl": 1.3e9}
ROUNDED |= {"gpt3-2.7b": 2.7e9, "gpt3-6.7b": 6.7e9, "gpt3-13b": 13e9}
CONFIGS = {name: ScratchGPTConfig.from_preset(name) for name in PRESETS} | {
    f"random{seed}": random_config(seed) for seed in range(4)
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_parameters_are_those_of_the_model_component_by_component(config):
    with torch.device("meta"):
        model = ScratchGPTForCausalLM(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    counts = count_parameters(config)
    assert vars(counts) == {
        component: sum(size for name, size in sizes.items() if part in name)
        for component, part in COMPONENTS.items()
    }
    assert counts.total == sum(sizes.values())
    other = ScratchGPTConfig.from_dict(
        {**config.to_dict(), "tie_word_embeddings": not config.tie_word_embeddings}
    )
    with torch.device("meta"):
        other_total = sum(p.numel() for p in ScratchGPTForCausalLM(other).parameters())
    totals = {config.tie_word_embeddings: counts.total, other.tie_word_embeddings: other_total}
    assert {True: counts.tied_total, False: counts.untied_total} == totals


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("124M", 124_439_808),
        ("355M", 354_823_168),
        ("774M", 774_030_080),
        ("1558M", 1_557_611_200),
        *((name, pytest.approx(number, rel=0.03)) for name, number in ROUNDED.items()),
        ("gpt3", pytest.approx(175e9, rel=0.005)),
    ],
)
def test_parameters_are_those_published(preset, parameters):
    assert count_parameters(ScratchGPTConfig.from_preset(preset)).total == parameters


def test_storage_is_that_of_tensors_and_the_textbooks_621_83_mib():
    textbook = ScratchGPTConfig.from_preset("124M", tie_word_embeddings=False, qkv_bias=False)
    parameters = count_parameters(textbook).total
    assert parameters == 163_009_536
    assert round(storage_bytes(parameters) / 2**20, 2) == 621.83
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        name = str(dtype).removeprefix("torch.")
        assert storage_bytes(12_345, name) == torch.empty(12_345, dtype=dtype).nbytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_takes_the_bytes_of_the_keys_and_values(dtype):
    config = tiny_config()
    model = ScratchGPTForCausalLM(config).to(getattr(torch, dtype)).eval()
    with torch.no_grad():
        cache = model(random_ids(1, 17), use_cache=True).cache
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_cache_bytes(config, 17, dtype) == held
    assert kv_cache_bytes(config, dtype=dtype) * 17 == held


# torch's counter has no formula for the attention kernel of CPUs; these are its own for others.
KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
KERNEL_FORMULAS = {
    KERNEL: lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: flop_counter.sdpa_backward_flop_count(grad, q, k, v)
    ),
}


@pytest.mark.parametrize("fields", [{}, {"qkv_bias": False, "intermediate_size": 201}])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_flops_are_those_that_torch_counts(attention, dropout, fields):
    length = 96
    sizes = dict(vocab_size=501, n_embd=64, n_layer=3, n_head=4, drop_rate=dropout)
    config = ScratchGPTConfig(**sizes, **fields)
    model = ScratchGPTForCausalLM(config).train()
    model.set_attn_implementation(attention)
    batch = torch.randint(0, 501, (2, length))
    options = dict(display=False, custom_mapping=KERNEL_FORMULAS)
    forward, training = (flop_counter.FlopCounterMode(**options) for _ in range(2))
    with training:
        with forward:
            loss = model(batch, labels=batch).loss
        loss.backward()
    by_kernel = KERNEL in forward.get_flop_counts()["Global"]
    assert by_kernel == (attention == "sdpa" and dropout == 0)
    counted = [counter.get_total_flops() / batch.numel() for counter in (forward, training)]
    # Fused kernels compute the scores again in the backward pass (Dao et al. 2022, section 3.1).
    again = 2 * length * config.hidden_size * config.num_hidden_layers if by_kernel else 0
    trained = training_flops_per_token(config, length) + again
    assert [forward_flops_per_token(config, length), trained] == counted


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made in this context take at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return made


def train(config, batch_size, length, attention="sdpa", checkpointing=False) -> None:
    """Make a model and take two steps: the second has AdamW's moments from the start."""
    model = ScratchGPTForCausalLM(config).train()
    model.set_attn_implementation(attention)
    if checkpointing:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randint(0, config.vocab_size, (batch_size, length))
    for _ in range(2):
        model(batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


SIZES = dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=4, vocab_size=1000)


@pytest.mark.parametrize("length", [32, 128])
@pytest.mark.parametrize(
    ("fields", "attention", "checkpointing"),
    [
        ({}, "sdpa", False),
        ({}, "eager", False),
        ({}, "sdpa", True),
        ({"drop_rate": 0.0}, "sdpa", False),
        ({"drop_rate": 0.0}, "sdpa", True),
        ({"drop_rate": 0.0}, "eager", False),
        ({"tie_word_embeddings": False, "intermediate_size": 101}, "sdpa", False),
        ({"vocab_size": 50}, "sdpa", False),
        ({"chunked_loss": True}, "sdpa", False),
        ({"fused_kernels": False}, "sdpa", False),
        ({"fused_kernels": False, "hidden_act": "gelu"}, "sdpa", False),
    ],
    ids=str,
)
def test_memory_of_a_step_is_that_of_the_tensors_alive(fields, attention, checkpointing, length):
    config = ScratchGPTConfig(**{**SIZES, **fields})
    with LiveBytes() as live:
        train(config, 2, length, attention, checkpointing)
    predicted = training_memory(config, 2, length, attention, checkpointing)
    assert predicted.peak == pytest.approx(live.peak, rel=0.03)


def test_published_years_of_gpt3_follow_from_their_rates():
    tokens, per_year = 300e9, 365.25 * 86400
    table_d1 = 3.14e23 / tokens
    assert int(training_seconds(table_d1, tokens, 28e12) / per_year) == 355
    assert int(training_seconds(6 * 175e9, tokens, 15e12) / per_year) == 665
    per_token = rule_of_thumb_flops_per_token(ScratchGPTConfig.from_preset("gpt3"))
    assert int(training_seconds(per_token, tokens, 28e12) / per_year) == 355
    assert training_seconds(per_token, tokens, 15e12) / per_year == pytest.approx(665, rel=0.002)


def test_durations_are_in_the_largest_unit_that_they_fill():
    for seconds, text in [
        (1.1214e10, "355.4 years"),
        (4e11, "12,675.2 years"),
        (2 * 86400, "2.0 days"),
        (5400, "1.5 hours"),
        (90, "1.5 minutes"),
        (0.25, "0.2 seconds"),
    ]:
        assert humanize_seconds(seconds) == text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda config: storage_bytes(1, "float8"), r"dtype='float8'.*float32"),
        (lambda config: kv_cache_bytes(config, 1, "int4"), r"dtype='int4'"),
        (lambda config: forward_flops_per_token(config, 65), r"length=65.*64 positions"),
        (lambda config: training_flops_per_token(config, 0), r"length=0.*64 positions"),
        (lambda config: training_memory(config, 0), r"batch_size=0.*below 1"),
        (lambda config: training_memory(config, 1, 65), r"length=65.*64 positions"),
        (lambda config: training_memory(config, attention="flex"), r"'flex'.*eager"),
        (lambda config: training_seconds(1, 0, 1), r"tokens=0 "),
        (lambda config: training_seconds(1, 1, -5), r"flops_per_second=-5 "),
        (lambda config: training_seconds(1, float("inf"), 1), r"tokens=inf "),
    ],
)
def test_bad_values_are_refused_with_value_and_limit(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_config())
