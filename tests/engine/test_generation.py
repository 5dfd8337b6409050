"""What is optimized for generation writes what the model wrote before."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from transformers import (
    DynamicCache,
    GenerationConfig,
    MaxLengthCriteria,
    StaticCache,
    StoppingCriteriaList,
    TextStreamer,
    set_seed,
)

from hf_scratch_gpt import ScratchGPTForCausalLM, ScratchGPTModel, optimize_for_generation
from hf_scratch_gpt.engine.generation import _with_static_cache

from ..models import SMALL_CACHE, random_gpt2, random_ids, random_model


@pytest.fixture(scope="module")
def models():
    """A model, and a copy of it that has been optimized."""
    torch.manual_seed(0)
    model = random_model(ScratchGPTForCausalLM).eval()
    model.generation_config.eos_token_id = None
    return model, optimize_for_generation(copy.deepcopy(model))


def write(model, ids, count=12, **arguments):
    set_seed(1)
    mask = torch.ones_like(ids)
    return model.generate(
        ids, **{"attention_mask": mask, "max_new_tokens": count, "pad_token_id": 0} | arguments
    )


WAYS = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, top_k=20),
    "repetition penalty": dict(do_sample=False, repetition_penalty=1.5),
    "beams": dict(do_sample=False, num_beams=3),
    "no cache": dict(do_sample=False, use_cache=False),
    "static cache": dict(do_sample=False, cache_implementation="static"),
    "prompt lookup": dict(do_sample=False, prompt_lookup_num_tokens=3),
    "two of each": dict(do_sample=True, num_return_sequences=2),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_ids(models, way, steps):
    ids = random_ids(1, 1 if way == "greedy" else 7)
    before, after = (write(model, ids, **WAYS[way]) for model in models)
    assert after.tolist() == before.tolist()
    assert after.shape[1] > ids.shape[1]
    by_steps = ("greedy", "sampling", "repetition penalty", "two of each")
    assert len(steps) == (11 if way in by_steps else 0)


def test_four_threads_at_once(models):
    prompts = [random_ids(1, length) for length in (5, 6, 7, 8)]
    expected = [write(models[0], ids, do_sample=False).tolist() for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        written = pool.map(lambda ids: write(models[1], ids, do_sample=False).tolist(), prompts)
    assert list(written) == expected


def test_in_other_modes():
    model = random_model(ScratchGPTForCausalLM).eval()
    ids = random_ids(1, 6)
    expected = write(model, ids, do_sample=False).tolist()
    fast = optimize_for_generation(copy.deepcopy(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before, after = (write(each, ids, do_sample=False).tolist() for each in (model, fast))
        assert after == before
    with torch.inference_mode():
        assert write(fast, ids, do_sample=False).tolist() == expected
    assert write(fast, ids, do_sample=False).tolist() == expected


def test_made_or_optimized_in_inference_mode():
    ids = random_ids(1, 6)
    with torch.inference_mode():
        made_there = random_model(ScratchGPTForCausalLM).eval()
    expected = write(made_there, ids, do_sample=False).tolist()
    assert write(optimize_for_generation(made_there), ids, do_sample=False).tolist() == expected
    model = random_model(ScratchGPTForCausalLM).eval()
    expected = write(model, ids, do_sample=False).tolist()
    with torch.inference_mode():
        optimize_for_generation(model)
    assert write(model, ids, do_sample=False).tolist() == expected
    model.lm_head.weight.sum().backward()


def test_a_cache_that_is_given_is_filled(models):
    ids = random_ids(1, 6)
    caches = [DynamicCache(config=model.config) for model in models]
    for model, cache in zip(models, caches, strict=True):
        write(model, ids, do_sample=False, cache=cache)
    assert caches[1].get_seq_length() == caches[0].get_seq_length() > 6
    for before, after in zip(*(cache.layers for cache in caches), strict=True):
        torch.testing.assert_close(after.keys, before.keys, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "way", ["greedy", "sampling", "repetition penalty", "two of each", "beams"]
)
def test_texts_of_different_lengths_that_end_early(models, way, steps):
    """Texts that have ended are padded; those that go on are as if nothing had ended."""
    ids = random_ids(9, 8)
    mask = (torch.arange(8) >= torch.tensor([[3, 0, 0, 7, 1, 2, 0, 5, 0]]).T).long()
    arguments = WAYS[way] | dict(attention_mask=mask, pad_token_id=96)
    end = write(models[0], ids, **arguments)[4, 11].item()
    before, after = (write(model, ids, eos_token_id=end, **arguments) for model in models)
    assert after.tolist() == before.tolist()
    assert (after == end).any()
    assert len(steps) == (0 if way == "beams" else after.shape[1] - 9)


def test_padding_on_the_right_is_left_to_the_model(models, steps, logged_warnings):
    ids, mask = random_ids(3, 8), torch.ones(3, 8, dtype=torch.long)
    mask[0, -2:] = 0
    before, after = (write(model, ids, do_sample=False, attention_mask=mask) for model in models)
    assert after.tolist() == before.tolist()
    assert not steps


def test_to_the_last_position_and_not_past_it(models, logged_warnings):
    limit = models[0].config.max_position_embeddings
    ids = random_ids(1, limit - 4)
    before, after = (write(model, ids, count=4, do_sample=False) for model in models)
    assert after.tolist() == before.tolist()
    for model in models:
        with pytest.raises(ValueError, match=f"{limit + 1} tokens exceed the model's {limit}"):
            write(model, ids, count=6, do_sample=False)
        mask = torch.tensor([[0, 0, 1], [0, 1, 1]]).repeat_interleave(limit // 3, 1)
        longest = int(mask.sum(-1).max())
        arguments = dict(do_sample=False, attention_mask=mask)
        with pytest.raises(ValueError, match=f"{limit + 1} tokens exceed the model's {limit}"):
            write(model, random_ids(*mask.shape), count=limit - longest + 2, **arguments)


def test_end_of_text_and_streamer(models):
    ids = random_ids(1, 6)
    whole = write(models[0], ids, do_sample=False)
    end = whole[0, 9].item()
    assert write(models[1], ids, do_sample=False, eos_token_id=end).tolist() == (
        write(models[0], ids, do_sample=False, eos_token_id=end).tolist()
    )

    class Watcher(TextStreamer):
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.seen.append("end")

    for ways in (dict(), dict(use_cache=False)):
        watcher = Watcher()
        write(models[1], ids, do_sample=False, streamer=watcher, **ways)
        assert watcher.seen == [*whole[0].tolist(), "end"]


def test_stopping_and_a_loop_of_the_callers(models, steps):
    """A criterion of the caller's is asked as before; a loop of the caller's is left alone."""
    ids = random_ids(1, 6)
    stop = [lambda ids, scores: torch.tensor([ids.shape[1] >= 9])]
    before, after = (write(m, ids, do_sample=False, stopping_criteria=stop) for m in models)
    assert after.tolist() == before.tolist()
    assert after.shape == (1, 9)
    assert len(steps) == 2
    assert write(models[1], ids, custom_generate=lambda model, ids, **kwargs: ids) is ids


@pytest.mark.parametrize("length", [3, 20, 60])
@pytest.mark.parametrize("count", [3, 30])
def test_a_length_of_the_callers_goes_before_the_configurations(
    models, steps, length, count, logged_warnings
):
    ids, stop = random_ids(2, 4), StoppingCriteriaList([MaxLengthCriteria(length)])
    before, after = (
        write(model, ids, count, do_sample=False, stopping_criteria=stop) for model in models
    )
    assert after.tolist() == before.tolist()
    assert after.shape == (2, max(5, length))
    assert len(steps) == max(0, length - 5)


def test_padding_that_generate_finds_by_itself(models, steps):
    """Without a mask, transformers takes the padding token for padding."""
    ids = random_ids(1, 6)
    ids[0, :2] = 96
    arguments = dict(max_new_tokens=4, do_sample=False, pad_token_id=96, eos_token_id=5)
    before, after = (model.generate(ids, **arguments) for model in models)
    assert after.tolist() == before.tolist()
    assert len(steps) == 3
    before, after = (model.generate(max_new_tokens=4, do_sample=False) for model in models)
    assert after.tolist() == before.tolist()


def test_settings_of_the_model_count(models, steps):
    ids = random_ids(1, 6)
    for model in models:
        model.generation_config.num_beams = 2
    before, after = (write(model, ids) for model in models)
    for model in models:
        model.generation_config.num_beams = None
    assert after.tolist() == before.tolist()
    assert not steps
    given = GenerationConfig(do_sample=False, max_new_tokens=3, pad_token_id=0)
    mask = torch.ones_like(ids)
    before, after = (model.generate(ids, given, attention_mask=mask) for model in models)
    assert after.tolist() == before.tolist()
    assert len(steps) == 2


def test_dictionaries_and_positions_given(models):
    ids = random_ids(1, 6)
    arguments = dict(do_sample=False, return_dict_in_generate=True, output_scores=True)
    before, after = (write(model, ids, **arguments) for model in models)
    assert after.sequences.tolist() == before.sequences.tolist()
    torch.testing.assert_close(after.scores, before.scores)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_scores_of_another_type_and_with_ties(models, dtype, steps):
    """What a caller's own function makes of the scores; the first of the best is taken."""
    processors = [lambda ids, scores: scores.to(dtype).round(decimals=1)]
    ids = random_ids(1, 6)
    before, after = (
        write(model, ids, do_sample=False, logits_processor=processors) for model in models
    )
    assert after.tolist() == before.tolist()
    assert len(steps) == 11


def test_saves_as_before(models, tmp_path):
    model, fast = models
    fast.save_pretrained(tmp_path)
    loaded = ScratchGPTForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["ScratchGPTForCausalLM"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_errors(models):
    with pytest.raises(ValueError, match=r"optimized already; call restore\(model\)"):
        optimize_for_generation(models[1])
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not a model of hf_scratch_gpt"):
        optimize_for_generation(random_gpt2())
    with pytest.raises(ValueError, match="training mode"):
        optimize_for_generation(random_model(ScratchGPTForCausalLM).train())
    with pytest.raises(ValueError, match="cannot generate"):
        optimize_for_generation(ScratchGPTModel(models[0].config).eval())
    with pytest.raises(ValueError, match="'int3' is not a format; give one of int8, int4, fp8"):
        optimize_for_generation(random_model(ScratchGPTForCausalLM).eval(), weights="int3")
    with pytest.raises(ValueError, match="'int4' needs a GPU; give 'int8'"):
        optimize_for_generation(random_model(ScratchGPTForCausalLM).eval(), weights="int4")
    with pytest.raises(ValueError, match="on the device meta, without numbers; load its weights"):
        optimize_for_generation(random_model(ScratchGPTForCausalLM).eval().to("meta"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapted_model_is_told_what_to_give():
    adapted = get_peft_model(random_model(ScratchGPTForCausalLM), LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"holds the model apart; give model.merge_and_unload()"):
        optimize_for_generation(adapted.eval())
    optimize_for_generation(adapted.merge_and_unload())


def test_a_mask_of_another_shape_is_an_error_as_before(models):
    for model in models:
        with pytest.raises(ValueError, match=r"2 rows for 1 texts|shape \[2, 6\]; give"):
            write(model, random_ids(1, 6), attention_mask=torch.ones(2, 6), do_sample=False)


def test_int8_keeps_the_probabilities():
    model = random_model(ScratchGPTForCausalLM).eval()
    fast = optimize_for_generation(copy.deepcopy(model), weights="int8")
    ids = random_ids(1, 24)
    with torch.no_grad():
        before, after = (m(ids, labels=ids).loss for m in (model, fast))
    assert 0 < abs(after - before) / before < 0.01
    for rows in (1, 3):
        assert write(fast, random_ids(rows, 6), do_sample=False).shape == (rows, 18)
    with pytest.raises(ValueError, match="save the model before"):
        fast.save_pretrained("nowhere")


class Doubled(torch.nn.Module):
    """A feed-forward that no C++ knows."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def double_by_hook(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: 2 * output)


def double_by_module(model):
    model.model.layers[1].mlp = Doubled(model.model.layers[1].mlp)


def double_by_method(model):
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x, forward=mlp.forward: 2 * forward(x)


@pytest.mark.parametrize("change", [double_by_hook, double_by_module, double_by_method])
def test_changed_models_go_the_ordinary_way(models, change, steps):
    changed, fast = (copy.deepcopy(model) for model in models)
    ids = random_ids(1, 6)
    change(changed)
    expected = write(changed, ids, do_sample=False)
    assert expected.tolist() != write(fast, ids, do_sample=False).tolist()
    change(fast)
    steps.clear()
    assert write(fast, ids, do_sample=False).tolist() == expected.tolist()
    assert not steps


class ShiftedForCausalLM(ScratchGPTForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask, **kwargs)
        outputs.logits = outputs.logits.roll(1, -1)
        return outputs


class Tripled(torch.nn.Linear):
    def forward(self, input):
        return -3 * super().forward(input)


def with_a_linear_of_its_own(model):
    up_proj = model.model.layers[0].mlp.up_proj
    own = Tripled(up_proj.in_features, up_proj.out_features)
    own.load_state_dict(up_proj.state_dict())
    model.model.layers[0].mlp.up_proj = own
    return model


def with_a_parametrization(model):
    up_proj = model.model.layers[0].mlp.up_proj
    torch.nn.utils.parametrize.register_parametrization(up_proj, "weight", torch.nn.Tanh())
    return model


@pytest.mark.parametrize(
    "change",
    [
        with_a_linear_of_its_own,
        with_a_parametrization,
        lambda model: ShiftedForCausalLM(model.config),
    ],
    ids=["linear", "parametrization", "class"],
)
def test_classes_of_others(change, steps):
    model = change(random_model(ScratchGPTForCausalLM)).eval()
    ids = random_ids(1, 6)
    expected = write(model, ids, do_sample=False).tolist()
    assert write(optimize_for_generation(model), ids, do_sample=False).tolist() == expected
    assert not steps


@pytest.mark.parametrize("weights", [None, "int8"])
@torch.no_grad()
def test_adapters(weights):
    model = random_model(ScratchGPTForCausalLM).eval()
    without = model(ids := random_ids(1, 6)).logits
    names = ["q_proj", "down_proj"]
    inject_adapter_in_model(LoraConfig(target_modules=names, init_lora_weights=False), model)
    expected = model.eval()(ids).logits
    after = optimize_for_generation(model, weights)(ids).logits
    assert (after - expected).norm() < 0.1 * (without - expected).norm()


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_another_default_type(models, default, steps):
    ids = random_ids(1, 6)
    expected = write(models[0], ids, do_sample=False).tolist()
    torch.set_default_dtype(default)
    try:
        assert write(models[1], ids, do_sample=False).tolist() == expected
    finally:
        torch.set_default_dtype(torch.float32)
    assert steps


def test_a_model_that_is_converted_has_new_memory(steps):
    model = random_model(ScratchGPTForCausalLM).eval().to(torch.bfloat16)
    optimize_for_generation(model, weights="int8")
    ids = random_ids(1, 6)
    write(model, ids, do_sample=False)
    model.float()
    with torch.no_grad():
        scores = model(write(model, ids, do_sample=False)).logits[0, 5:-1]
    chosen = scores.gather(1, write(model, ids, do_sample=False)[0, 6:, None])[:, 0]
    assert (scores.max(-1).values - chosen).max() < 0.01
    assert len(steps) == 33


def test_what_a_gpu_is_given():
    """A static cache, unless another one is asked for."""
    model, ids, seen = random_model(ScratchGPTForCausalLM).eval(), random_ids(1, 6), []
    settings = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    expected = model.generate(ids, **settings).tolist()
    config, own = GenerationConfig(**settings), GenerationConfig(**settings)
    own.cache_implementation = "dynamic"
    model.register_forward_hook(lambda module, args, output: seen.append(type(output.cache)))
    for args, kwargs in (((), settings), ((config,), {}), ((), {"generation_config": own})):
        args, kwargs = _with_static_cache(model, args, kwargs)
        assert model.generate(ids, *args, **kwargs).tolist() == expected
    assert seen == 8 * [StaticCache] + 4 * [DynamicCache]
    assert config.cache_implementation is None


def test_continuous_batching():
    model = random_model(ScratchGPTForCausalLM).eval()
    prompts = [random_ids(1, length)[0].tolist() for length in (3, 5)]
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    before, after = (
        [
            output.generated_tokens
            for output in each.generate_batch(prompts, config, SMALL_CACHE).values()
        ]
        for each in (model, optimize_for_generation(copy.deepcopy(model)))
    )
    assert after == before
