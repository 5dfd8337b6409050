"""What is optimized for generation writes what the model wrote before."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig
from transformers import DynamicCache, TextStreamer, set_seed

from hf_scratch_gpt import ScratchGPTForCausalLM, ScratchGPTModel, optimize_for_generation

from .models import random_ids, random_model


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
def test_the_same_ids(models, way):
    ids = random_ids(1, 7)
    before, after = (write(model, ids, **WAYS[way]) for model in models)
    assert after.tolist() == before.tolist()
    assert after.shape[1] > 7


@pytest.mark.parametrize("length", [1, 2, 9, 20])
def test_other_prompts(models, length):
    ids = random_ids(1, length)
    before, after = (write(model, ids, do_sample=False) for model in models)
    assert after.tolist() == before.tolist()


def test_models_side_by_side(models):
    ids = random_ids(1, 6)
    write(models[1], ids, do_sample=False)
    other = random_model(ScratchGPTForCausalLM, num_hidden_layers=2, hidden_size=48).eval()
    expected = write(other, ids, do_sample=False)
    assert write(optimize_for_generation(other), ids, do_sample=False).tolist() == expected.tolist()
    copied = copy.deepcopy(models[1])
    assert write(copied, ids, do_sample=False).tolist() == (
        write(models[0], ids, do_sample=False).tolist()
    )


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
        write(fast, ids, do_sample=False)
    with torch.inference_mode():
        assert write(fast, ids, do_sample=False).tolist() == expected
    assert write(fast, ids, do_sample=False).tolist() == expected


def test_a_cache_that_is_given_is_filled(models):
    ids = random_ids(1, 6)
    caches = [DynamicCache(config=model.config) for model in models]
    for model, cache in zip(models, caches, strict=True):
        write(model, ids, do_sample=False, past_key_values=cache)
    assert caches[1].get_seq_length() == caches[0].get_seq_length() > 6


def test_several_texts_with_padding(models):
    ids = random_ids(3, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for rows in (3, 1):  # one padded text goes the plain way too
        before, after = (
            write(model, ids[:rows], do_sample=False, attention_mask=mask[:rows])
            for model in models
        )
        assert after.tolist() == before.tolist()


def test_to_the_last_position_and_not_past_it(models, logged_warnings):
    limit = models[0].config.max_position_embeddings
    ids = random_ids(1, limit - 4)
    before, after = (write(model, ids, count=4, do_sample=False) for model in models)
    assert after.tolist() == before.tolist()
    for model in models:
        with pytest.raises(ValueError, match=f"{limit + 1} tokens exceed the model's {limit}"):
            write(model, ids, count=6, do_sample=False)


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

    watcher = Watcher()
    write(models[1], ids, do_sample=False, streamer=watcher)
    assert watcher.seen == [*whole[0].tolist(), "end"]


def test_dictionaries_and_positions_given(models):
    ids = random_ids(1, 6)
    arguments = dict(do_sample=False, return_dict_in_generate=True, output_scores=True)
    before, after = (write(model, ids, **arguments) for model in models)
    assert after.sequences.tolist() == before.sequences.tolist()
    torch.testing.assert_close(after.scores, before.scores)


def test_logits_of_a_text(models):
    """Without `generate`, and with weights packed for oneDNN."""
    ids = random_ids(2, 16)
    with torch.no_grad():
        before, after = (model(ids).logits for model in models)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_bfloat16():
    model = random_model(ScratchGPTForCausalLM).eval().to(torch.bfloat16)
    fast = optimize_for_generation(copy.deepcopy(model))
    ids = random_ids(1, 6)
    after = write(fast, ids, do_sample=False)
    # Rounding may choose another token where two are as good; the scores say so.
    with torch.no_grad():
        scores = model.float()(after).logits[0, 5:-1]
    chosen = scores.gather(1, after[0, 6:, None])[:, 0]
    assert (scores.max(-1).values - chosen).max() < 0.05


def test_saves_as_before(models, tmp_path):
    model, fast = models
    fast.save_pretrained(tmp_path)
    loaded = ScratchGPTForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["ScratchGPTForCausalLM"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_errors(models):
    with pytest.raises(ValueError, match="optimized already"):
        optimize_for_generation(models[1])
    with pytest.raises(ValueError, match="training mode"):
        optimize_for_generation(random_model(ScratchGPTForCausalLM).train())
    with pytest.raises(ValueError, match="cannot generate"):
        optimize_for_generation(ScratchGPTModel(models[0].config).eval())
    with pytest.raises(ValueError, match="'int3' is no format; give one of int8, int4, fp8"):
        optimize_for_generation(random_model(ScratchGPTForCausalLM).eval(), weights="int3")
    with pytest.raises(ValueError, match="'int4' needs a GPU; give 'int8'"):
        optimize_for_generation(random_model(ScratchGPTForCausalLM).eval(), weights="int4")


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


def test_int8_weights_are_the_nearest():
    model = random_model(ScratchGPTForCausalLM).eval()
    exact = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimize_for_generation(model, weights="int8")
    for name in ("model.layers.0.mlp.up_proj", "lm_head"):
        layer = model.get_submodule(name)
        difference = layer.weight * layer.weight_scale[:, None] - exact[f"{name}.weight"]
        assert (difference.abs() <= layer.weight_scale[:, None] * 0.5001).all()
        assert (layer.weight.abs().amax(1) == 127).all()
    assert torch.equal(model.model.embed_tokens.weight, exact["model.embed_tokens.weight"])


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
def test_changed_models_go_the_ordinary_way(models, change):
    changed, fast = (copy.deepcopy(model) for model in models)
    ids = random_ids(1, 6)
    change(changed)
    expected = write(changed, ids, do_sample=False)
    assert expected.tolist() != write(fast, ids, do_sample=False).tolist()
    change(fast)
    assert write(fast, ids, do_sample=False).tolist() == expected.tolist()


def test_adapters():
    model = random_model(ScratchGPTForCausalLM).eval()
    config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model.add_adapter(config)
    ids = random_ids(1, 6)
    expected = write(model.eval(), ids, do_sample=False)
    fast = optimize_for_generation(model)
    assert write(fast, ids, do_sample=False).tolist() == expected.tolist()
