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
    "beam": dict(do_sample=False, num_beams=4, num_return_sequences=2),
    "sampling": dict(do_sample=True, temperature=0.9, top_k=20, top_p=0.95),
    "beam sampling": dict(do_sample=True, num_beams=3),
}


@pytest.fixture(scope="module")
def pair(small_gpt2):
    models = (GPT2LMHeadModel, ScratchGPTForCausalLM)
    return [model_class.from_pretrained(small_gpt2) for model_class in models]


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


# transformers offloads from an accelerator alone
CACHES = [
    dict(cache_implementation=name)
    for name in ("dynamic", "static", "offloaded", "offloaded_static")
    if torch.accelerator.is_available() or not name.startswith("offloaded")
]


@pytest.fixture(params=[False, True], ids=["plain", "optimized"])
def ours(request, pair):
    return optimize_for_generation(copy.deepcopy(pair[1])) if request.param else pair[1]


@pytest.mark.parametrize(
    ("beams", "rows", "settings"),
    [
        *((*size, cache) for size in [(1, 1), (1, 3), (3, 3)] for cache in CACHES),
        (1, 1, dict(prompt_lookup_num_tokens=3)),
    ],
)
def test_every_cache_gives_the_ids_of_no_cache(pair, ours, beams, rows, settings):
    """Against GPT-2's without a cache: two models that ignore a cache alike would agree."""
    ids = random_ids(3, 12)[:rows]
    mask = torch.ones_like(ids)
    mask[-1, :5] = 0
    ids[mask == 0] = VOCABULARY - 1
    arguments = dict(do_sample=False, eos_token_id=None, num_beams=beams)
    expected = generate(pair[0], ids, mask, use_cache=False, **arguments)
    generated = generate(ours, ids, mask, **settings, **arguments)
    assert generated.tolist() == expected.tolist()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("settings", [dict(use_cache=False), *CACHES], ids=str)
def test_token_types_are_added_as_gpt2_adds_them(pair, ours, settings, rows, beams):
    """What is written has the type of the prompt's last token."""
    ids, types = random_ids(rows, 12), random_ids(rows, 12)
    mask = torch.ones_like(ids)
    mask[1:, :5] = 0
    arguments = dict(do_sample=False, eos_token_id=None, num_beams=beams)
    expected = generate(pair[0], ids, mask, token_type_ids=types, use_cache=False, **arguments)
    generated = generate(ours, ids, mask, token_type_ids=types, **settings, **arguments)
    assert generated.tolist() == expected.tolist()
    assert generated.tolist() != generate(ours, ids, mask, **settings, **arguments).tolist()


def test_a_cache_that_is_passed_to_generate_is_filled_and_read(pair, ours):
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
    ids, config = random_ids(1, 12), {"backend": backend, "residual_length": 4}
    settings = dict(cache_implementation="quantized", cache_config=config)
    arguments = dict(do_sample=False, eos_token_id=None, **settings)
    expected, generated = (generate(model, ids, **arguments) for model in pair)
    assert generated.tolist() == expected.tolist()


def test_assisted_decoding_equals_gpt2s(pair, logged_warnings):
    ids, assistant = random_ids(1, 12), random_gpt2(n_layer=1)
    assisted = [
        generate(model, ids, do_sample=False, assistant_model=assistant)
        for model, assistant in ((pair[0], assistant), (pair[1], assistant), pair)
    ]
    for generated in assisted:
        assert generated.tolist() == generate(pair[0], ids, do_sample=False).tolist()
    # What transformers says, once in a process, of how it calls the assistant itself.
    of_its_own = ("Passing `generation_config` together", "We strongly recommend passing in an")
    assert all(warning.startswith(of_its_own) for warning in logged_warnings)


def test_prompt_as_embeddings(pair):
    ids = random_ids(1, 6)
    embeds = pair[1].get_input_embeddings()(ids)
    arguments = dict(attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    generated = pair[1].generate(inputs_embeds=embeds, **arguments)
    assert generated[0].tolist() == generate(pair[1], ids, do_sample=False)[0, 6:].tolist()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_continuous_batching_equals_gpt2s_and_single_prompts(small_gpt2, implementation):
    prompts = [random_ids(length).tolist() for length in (5, 12, 9, 1)]
    config = GenerationConfig(
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
    )
    results = []
    for model_class in (GPT2LMHeadModel, ScratchGPTForCausalLM):
        model = model_class.from_pretrained(small_gpt2, attn_implementation=implementation)
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


@pytest.mark.long
@torch.no_grad()
def test_compiled_forward_equals_eager(pair):
    torch._dynamo.reset()
    ids = random_ids(2, 12)
    compiled = torch.compile(pair[1], fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, pair[1](ids).logits, atol=1e-5, rtol=0)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:`treespec.children_specs` is deprecated:FutureWarning")
@torch.no_grad()
def test_export_equals_eager(pair, logged_warnings):
    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

    for dynamic in (False, True):
        torch._dynamo.reset()
        ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
        mask[0, :3] = 0
        inputs, config = {"input_ids": ids, "attention_mask": mask}, DynamoConfig(dynamic=dynamic)
        exported = DynamoExporter().export(pair[1], inputs, config=config)
        if dynamic:
            inputs = {"input_ids": random_ids(3, 20), "attention_mask": torch.ones(3, 20).long()}
        expected, logits = pair[1](**inputs).logits, exported(**inputs).logits
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    # the exporter says that it is experimental, and that naming the dynamic axes would be faster
    assert all("Exporter is experi" in w or "dynamic=True" in w for w in logged_warnings)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Exporting aten..index:UserWarning")  # transformers' masks do
def test_the_older_onnx_exporter_takes_a_mask(pair, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")

    class OfIdsAndMask(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids, mask):
            return self.model(ids, attention_mask=mask, use_cache=False).logits

    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    path, names = str(tmp_path / "model.onnx"), ["ids", "mask"]
    exported = OfIdsAndMask(pair[1])
    torch.onnx.export(exported, (ids, mask), path, input_names=names, dynamo=False)
    inputs = {"ids": ids.numpy(), "mask": mask.numpy()}
    (logits,) = onnxruntime.InferenceSession(path).run(None, inputs)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = pair[0](ids, attention_mask=mask, position_ids=positions).logits
    kept = mask.bool()
    torch.testing.assert_close(torch.tensor(logits)[kept], expected[kept], atol=1e-4, rtol=0)
