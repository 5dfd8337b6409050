"""`generate` gives the ids that it gives with GPT2LMHeadModel, by every way of decoding."""

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, GPT2LMHeadModel, StaticCache, set_seed

from hf_scratch_gpt import ScratchGPTForCausalLM, optimize_for_generation

from ..models import SMALL_CACHE, VOCABULARY, random_gpt2, random_ids

WAYS = {
    "greedy": dict(do_sample=False),
    "greedy, no cache": dict(do_sample=False, use_cache=False),
    "greedy, static cache": dict(do_sample=False, cache_implementation="static"),
    "beam": dict(do_sample=False, num_beams=4, num_return_sequences=2),
    "sampling": dict(do_sample=True, temperature=0.9, top_k=20, top_p=0.95),
    "beam sampling": dict(do_sample=True, num_beams=3),
    "prompt lookup": dict(do_sample=False, prompt_lookup_num_tokens=3),
}


@pytest.fixture(scope="module")
def small_gpt2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small-gpt2")
    random_gpt2(n_layer=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(small_gpt2_folder):
    models = (GPT2LMHeadModel, ScratchGPTForCausalLM)
    return [model_class.from_pretrained(small_gpt2_folder) for model_class in models]


def generate(model, ids, mask=None, **arguments):
    set_seed(0)
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=12, **arguments)


@pytest.mark.parametrize("way", WAYS)
def test_ids_equal_gpt2s(pair, way):
    ids = random_ids(1, 12)
    expected, generated = (generate(model, ids, **WAYS[way]) for model in pair)
    assert generated.tolist() == expected.tolist()
    assert generated.shape[1] > 12


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_ids_of_left_padded_rows_equal_gpt2s_and_those_of_single_rows(pair, cache):
    ids = random_ids(3, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = mask[2, :9] = 0
    ids[mask == 0] = VOCABULARY - 1
    arguments = dict(do_sample=False, cache_implementation=cache, eos_token_id=None)
    expected, generated = (generate(model, ids, mask, **arguments) for model in pair)
    assert generated.tolist() == expected.tolist()
    for row, kept in enumerate(mask.bool()):
        alone = generate(pair[1], ids[row, kept].unsqueeze(0), **arguments)
        assert generated[row, 12:].tolist() == alone[0, kept.sum() :].tolist()


needs_accelerator = pytest.mark.skipif(
    not torch.accelerator.is_available(), reason="transformers offloads from an accelerator alone"
)


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize(
    "cache",
    [
        "dynamic",
        "static",
        pytest.param("offloaded", marks=needs_accelerator),
        pytest.param("offloaded_static", marks=needs_accelerator),
    ],
)
@pytest.mark.parametrize(("beams", "rows"), [(1, 1), (1, 3), (3, 3)])
def test_every_cache_gives_the_ids_of_no_cache(pair, beams, rows, cache, optimized):
    """Against GPT-2's without a cache: two models that ignore a cache alike would agree."""
    ids = random_ids(3, 12)[:rows]
    mask = torch.ones_like(ids)
    mask[-1, :5] = 0
    ids[mask == 0] = VOCABULARY - 1
    ours = optimize_for_generation(copy.deepcopy(pair[1])) if optimized else pair[1]
    arguments = dict(do_sample=False, eos_token_id=None, num_beams=beams)
    expected = generate(pair[0], ids, mask, use_cache=False, **arguments)
    generated = generate(ours, ids, mask, cache_implementation=cache, **arguments)
    assert generated.tolist() == expected.tolist()


@pytest.mark.parametrize("optimized", [False, True])
def test_prompt_lookup_gives_the_ids_of_no_cache(pair, optimized):
    ours = optimize_for_generation(copy.deepcopy(pair[1])) if optimized else pair[1]
    ids = random_ids(1, 12)
    arguments = dict(do_sample=False, eos_token_id=None)
    expected = generate(pair[0], ids, use_cache=False, **arguments)
    generated = generate(ours, ids, prompt_lookup_num_tokens=3, **arguments)
    assert generated.tolist() == expected.tolist()


@pytest.mark.parametrize("optimized", [False, True])
def test_a_cache_that_is_passed_to_generate_is_filled_and_read(pair, optimized):
    ours = optimize_for_generation(copy.deepcopy(pair[1])) if optimized else pair[1]
    ids = random_ids(1, 12)
    cache = DynamicCache(config=ours.config)
    first = generate(ours, ids, do_sample=False, eos_token_id=None, cache=cache)
    assert cache.get_seq_length() == first.shape[1] - 1
    more = torch.cat([first, random_ids(1, 3)], dim=1)
    expected = generate(pair[0], more, do_sample=False, eos_token_id=None, use_cache=False)
    with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
        generated = generate(ours, more, do_sample=False, eos_token_id=None, past_key_values=cache)
    assert generated.tolist() == expected.tolist()


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_quantized_cache_equals_gpt2s(pair, backend):
    pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[backend])
    ids = random_ids(1, 12)
    settings = dict(
        cache_implementation="quantized", cache_config={"backend": backend, "residual_length": 4}
    )
    expected, generated = (
        generate(model, ids, do_sample=False, eos_token_id=None, **settings) for model in pair
    )
    assert generated.tolist() == expected.tolist()


def test_assisted_decoding_equals_gpt2s(pair, logged_warnings):
    assistant = random_gpt2(n_layer=1)
    ids = random_ids(1, 12)
    expected, generated = (
        generate(model, ids, do_sample=False, assistant_model=assistant) for model in pair
    )
    assert generated.tolist() == expected.tolist()
    # transformers passes its own arguments to the assistant in the form that it deprecates
    assert all("Passing `generation_config` together" in warning for warning in logged_warnings)


def test_our_model_may_assist(pair, logged_warnings):
    ids = random_ids(1, 12)
    assisted = generate(pair[0], ids, do_sample=False, assistant_model=pair[1])
    # What transformers says, once in a process, of how it calls the assistant itself.
    of_its_own = ("Passing `generation_config` together", "We strongly recommend passing in an")
    assert all(warning.startswith(of_its_own) for warning in logged_warnings)
    assert assisted.tolist() == generate(pair[0], ids, do_sample=False).tolist()


def test_prompt_as_embeddings(pair):
    ids = random_ids(1, 6)
    embeds = pair[1].get_input_embeddings()(ids)
    generated = pair[1].generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
    )
    assert generated[0].tolist() == generate(pair[1], ids, do_sample=False)[0, 6:].tolist()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_continuous_batching_equals_gpt2s_and_single_prompts(small_gpt2_folder, implementation):
    prompts = [random_ids(length).tolist() for length in (5, 12, 9, 1)]
    config = GenerationConfig(
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
    )
    results = []
    for model_class in (GPT2LMHeadModel, ScratchGPTForCausalLM):
        model = model_class.from_pretrained(small_gpt2_folder, attn_implementation=implementation)
        answers = model.generate_batch(prompts, config, SMALL_CACHE, progress_bar=False)
        by_prompt = {
            tuple(answer.prompt_ids): answer.generated_tokens for answer in answers.values()
        }
        results.append([by_prompt[tuple(prompt)] for prompt in prompts])
        model.set_attn_implementation(implementation)
    assert results[0] == results[1]
    for prompt, answer in zip(prompts, results[1], strict=True):
        ids = torch.tensor([prompt])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert alone[0, len(prompt) :].tolist() == answer


@torch.no_grad()
def test_compiled_step_with_a_static_cache_equals_eager(pair):
    torch._dynamo.reset()
    model = pair[1]
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    ids = random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    logits = {}
    for name, step in [("eager", model.forward), ("compiled", compiled)]:
        cache = StaticCache(config=model.config, max_cache_len=32)
        output = model(ids, attention_mask=mask, cache=cache)
        tokens, pieces = output.logits[:, -1:].argmax(-1), []
        for length in range(13, 17):
            columns = torch.nn.functional.pad(mask, (0, length - 12), value=1)
            output = step(tokens, attention_mask=columns, cache=cache)
            tokens = output.logits[:, -1:].argmax(-1)
            pieces.append(output.logits)
        logits[name] = torch.cat(pieces, dim=1)
    torch.testing.assert_close(logits["compiled"], logits["eager"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_compiled_forward_equals_eager(pair):
    torch._dynamo.reset()
    ids = random_ids(2, 12)
    compiled = torch.compile(pair[1], fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, pair[1](ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.filterwarnings("ignore:`treespec.children_specs` is deprecated:FutureWarning")
@torch.no_grad()
def test_export_equals_eager(pair, dynamic, logged_warnings):
    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

    torch._dynamo.reset()
    ids = random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    exported = DynamoExporter().export(
        pair[1], {"input_ids": ids, "attention_mask": mask}, config=DynamoConfig(dynamic=dynamic)
    )
    if dynamic:
        ids, mask = random_ids(3, 20), torch.ones(3, 20, dtype=torch.long)
    expected = pair[1](ids, attention_mask=mask).logits
    logits = exported(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    # the exporter says that it is experimental, and that naming the dynamic axes would be faster
    assert all("Exporter is experi" in w or "dynamic=True" in w for w in logged_warnings)
