"""The step in C++ gives what the model gives."""

import copy

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers import DynamicCache

from hf_scratch_gpt import ScratchGPTForCausalLM, optimize_for_generation, restore
from hf_scratch_gpt.engine.one_token import OneToken, cache_with_room, can_compute
from hf_scratch_gpt.engine.packed import Int8Linear
from hf_scratch_gpt.engine.products import WAYS, call, product_of

from ..models import random_ids, random_model

READ = 5


@torch.no_grad()
def logits_by_steps(model, ids, way=0, threads=1):
    """Scores after each of `ids` (1, T) but the first few, which are read at once."""
    cache = cache_with_room(model, ids.shape, ids.shape[1] + 2)
    model(ids[:, :READ], cache=cache)
    torch.set_num_threads(threads)
    step = OneToken(model, cache, way)
    return torch.cat([step.logits_after(token[None, None]) for token in ids[0, READ:]], dim=1)


@torch.no_grad()
def logits_of_many(model, ids, first, threads=1):
    """The same of texts (B, T), of which those before `first` (B,) are padding."""
    cache = cache_with_room(model, ids.shape, ids.shape[1] + 2)
    mask = torch.arange(READ) >= first[:, None]
    model(ids[:, :READ], attention_mask=mask.long(), cache=cache)
    torch.set_num_threads(threads)
    step = OneToken(model, cache, first=first)
    return torch.cat([step.logits_after(column[:, None]) for column in ids[:, READ:].T], dim=1)


def make(dtype=torch.float32, weights=None, **changes):
    model = random_model(ScratchGPTForCausalLM, **changes).eval().to(dtype)
    assert can_compute(optimize_for_generation(model, weights))
    return model


CONFIGS = {
    "as it is": {},
    "exact GELU": dict(hidden_act="gelu"),
    "no bias of query, key, value": dict(qkv_bias=False),
    "unscaled": dict(scale_attn_weights=False),
    "scaled by layer": dict(scale_attn_by_inverse_layer_idx=True),
    "a head of its own": dict(tie_word_embeddings=False),
    "another epsilon": dict(layer_norm_eps=0.1),
    "narrow": dict(intermediate_size=7),
    "one head": dict(num_attention_heads=1),
    "eager": dict(attn_implementation="eager"),
    "blocks written out": dict(fused_kernels=False),
}


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits(name):
    model, ids = make(**CONFIGS[name]), random_ids(1, 24)
    exact = copy.deepcopy(model).double()(ids).logits[:, READ:]
    own = logits_by_steps(model, ids)
    assert own.dtype == torch.float32
    torch.testing.assert_close(own.double(), exact, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_of_texts_of_different_lengths(name):
    model, ids = make(**CONFIGS[name]), random_ids(13, 12)  # more than one tile's
    first = torch.arange(13) % READ
    own = logits_of_many(model, ids, first)
    exact = copy.deepcopy(model).double()
    for row, start in enumerate(first):
        expected = exact(ids[row : row + 1, start:]).logits[0, READ - start :]
        torch.testing.assert_close(own[row].double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@torch.no_grad()
def test_a_text_is_the_same_among_others(weights, monkeypatch):
    monkeypatch.setattr("hf_scratch_gpt.engine.half._SLOW_DTYPES", frozenset([torch.bfloat16]))
    dtype = torch.bfloat16 if weights == "bfloat16" else torch.float32
    model, ids = make(dtype, "int8" if weights == "int8" else None), random_ids(8, 12)
    first = torch.arange(8) % READ
    own = logits_of_many(model, ids, first)
    assert torch.equal(logits_of_many(model, ids, first, threads=3), own)
    for rows in ([3, 1], [7, 6, 5, 4, 3, 2, 1]):
        torch.testing.assert_close(logits_of_many(model, ids[rows], first[rows]), own[rows])
    alone = torch.cat([logits_by_steps(model, ids[row : row + 1]) for row in (0, READ)])
    tolerance = 1e-5 if weights == "float32" else 2e-2
    torch.testing.assert_close(own[[0, READ]], alone, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_texts_that_are_not_kept_are_not_read():
    model, ids = make(), random_ids(4, 8)
    cache = cache_with_room(model, ids.shape, ids.shape[1] + 2)
    model(ids, cache=cache)
    step = OneToken(model, cache)
    expected = model(torch.cat([ids, ids[:, :2]], dim=1)).logits[:, -2:]
    torch.testing.assert_close(step.logits_after(ids[:, :1]), expected[:, :1])
    step.keep(torch.tensor([False, True, False, True]))
    scores = step.logits_after(ids[:, 1:2])
    torch.testing.assert_close(scores[1::2], expected[1::2, 1:])
    assert not scores[::2].any()


@pytest.mark.parametrize("form", ["gelu", "gelu_new"])
@torch.no_grad()
def test_large_numbers(form):
    """Scores and GELU's inputs far beyond where e to their power is a number."""
    model, ids = make(hidden_act=form), random_ids(1, 24)
    for block in model.model.layers:
        block.self_attn.q_proj.weight.mul_(1000)
        block.mlp.up_proj.weight.mul_(1000)
    exact = copy.deepcopy(model).double()(ids).logits[:, READ:]
    own = logits_by_steps(model, ids).double()
    assert own.isfinite().all()
    assert (own - exact).norm() < 1e-3 * exact.norm()


@torch.no_grad()
def test_bfloat16_is_nearer_than_the_model():
    """Only keys, values and weights are rounded, not what is between."""
    model, ids = make(torch.bfloat16), random_ids(1, 24)
    exact = copy.deepcopy(model).double()(ids).logits[:, READ:]
    errors = [
        (logits - exact).abs().mean()
        for logits in (logits_by_steps(model, ids), model(ids).logits[:, READ:])
    ]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_int8(dtype):
    model, ids = make(dtype, "int8"), random_ids(1, 24)
    exact = copy.deepcopy(model).double()(ids).logits[:, READ:]
    atol = 2e-3 if dtype == torch.float32 else 2e-2  # vectors have 12 to 15 bits
    torch.testing.assert_close(logits_by_steps(model, ids).double(), exact, atol=atol, rtol=1e-2)


@pytest.mark.parametrize("room", [9, 12, 30])
@torch.no_grad()
def test_a_prompt_in_pieces_fills_the_room_that_there_is(room):
    model, ids = make(), random_ids(3, 9)
    cache = cache_with_room(model, ids.shape, room)
    memory = [layer.memory for layer in cache.layers]
    pieces = [model(piece, cache=cache).logits for piece in ids.split((4, 1, 4), dim=1)]
    expected = model(ids).logits
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=2e-5, rtol=2e-5)
    other = DynamicCache(config=model.config)
    model(ids, cache=other)
    for layer, own, usual in zip(cache.layers, memory, other.layers, strict=True):
        assert layer.keys.data_ptr() == own.data_ptr()
        torch.testing.assert_close(own[:, :, :, :9], torch.stack([usual.keys, usual.values]))


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(weights, number):
    model, ids = make(weights=weights), random_ids(1, 8)
    with torch.no_grad():
        model.model.norm.bias[3] = number
    assert not model(ids).logits.isfinite().any()
    assert not logits_by_steps(model, ids).isfinite().any()


def test_int8_sums_of_a_wide_matrix_have_room():
    """The largest that there can be: all weights and numbers of one sign."""
    linear = torch.nn.Linear(3072, 8, bias=False)
    torch.nn.init.constant_(linear.weight, 0.5)
    linear.__class__ = Int8Linear
    linear.prepare()
    held = []
    product, y = product_of(linear, held), torch.empty(8)
    for way in WAYS:
        call("product", product, way, torch.ones(3072), y)
        torch.testing.assert_close(y, torch.full((8,), 1536.0), rtol=1e-3, atol=0)


@torch.no_grad()
def test_int8_of_a_vector_of_zeros():
    model, ids = make(weights="int8"), random_ids(1, 8)
    model.model.norm.weight.zero_()
    model.model.norm.bias.zero_()
    assert (logits_by_steps(model, ids) == 0).all()


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@torch.no_grad()
def test_any_number_of_threads_and_way_to_read_gives_the_same(weights):
    dtype = torch.bfloat16 if weights == "bfloat16" else torch.float32
    model, ids = make(dtype, "int8" if weights == "int8" else None), random_ids(1, 8)
    results = []
    for threads in (1, 2, 3):
        for way in WAYS:
            torch.set_num_threads(1)
            results.append(logits_by_steps(model, ids, way, threads))
    assert all(torch.equal(result, results[0]) for result in results)  # each row is one thread's


def test_what_it_cannot_compute():
    assert not can_compute(make().train())
    assert not can_compute(make().half())
    assert not can_compute(make().double())
    relu = random_model(ScratchGPTForCausalLM, hidden_act="relu").eval()
    assert not can_compute(optimize_for_generation(relu))
    mixed = make(tie_word_embeddings=False)
    mixed.lm_head.to(torch.bfloat16)
    assert not can_compute(mixed)
    dropping = make()
    dropping.model.dropout.train()
    assert not can_compute(dropping)
    hooked = make()
    hooked.model.norm.register_forward_hook(lambda module, args, output: output)
    assert not can_compute(hooked)


def prune_one_layer(model):
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight.data, mlp.up_proj.bias.data = mlp.up_proj.weight[:4], mlp.up_proj.bias[:4]
    mlp.down_proj.weight.data = mlp.down_proj.weight[:, :4]


def lengthen_a_bias(model):
    model.model.norm.bias.data = torch.randn(33)


def give_the_head_a_bias(model):
    model.lm_head.bias = torch.nn.Parameter(torch.randn(97))


def prune_heads(model):
    for block in model.model.layers:
        attention = block.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight.data = projection.weight[:24]
            projection.bias.data = projection.bias[:24]
        attention.o_proj.weight.data = attention.o_proj.weight[:, :24]


@pytest.mark.parametrize(
    "change", [prune_one_layer, prune_heads, lengthen_a_bias, give_the_head_a_bias]
)
@torch.no_grad()
def test_other_shapes_are_refused(change):
    model = make()
    change(model)
    assert not can_compute(model)
    assert not can_compute(optimize_for_generation(restore(model)))


def test_hooks_on_all_modules_are_seen():
    model = make()
    handle = register_module_forward_hook(lambda module, args, output: None)
    try:
        assert not can_compute(model)
    finally:
        handle.remove()
    assert can_compute(model)


@torch.no_grad()
def test_what_differs_between_layers():
    model, ids = make(), random_ids(1, 24)
    model.model.layers[1].mlp.activation.form = "none"
    model.model.layers[2].input_layernorm.eps = 0.3
    model.model.norm.eps = 0.1
    model.model.layers[0].self_attn.scaling *= 2
    strided = torch.randn(32, 2)[:, 0]
    model.model.layers[0].input_layernorm.weight.data = strided
    model.model.layers[0].self_attn.k_proj.bias.data = torch.randn(32, 3)[:, 1]
    assert can_compute(model)
    exact = copy.deepcopy(model).double()(ids).logits[:, READ:]
    own = logits_by_steps(model, ids).double()
    torch.testing.assert_close(own, exact, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_hidden_states_that_were_asked_for_once_do_no_harm():
    model = make()
    model(random_ids(1, 4), output_hidden_states=True)
    assert can_compute(model)
