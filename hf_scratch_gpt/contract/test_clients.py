"""Arguments and outputs that clients rely on, and tools that read the model as a program."""

from typing import Any

import pytest
import torch
from transformers import AttentionInterface, ContinuousBatchingConfig, GenerationConfig, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .subject import PADDING, Subject, close, left_padded, random_ids


@torch.no_grad()
def test_embeddings_in_place_of_ids(subject: Subject) -> None:
    """`inputs_embeds` gives what the ids give.

    Serves soft prompts. Cure: look ids up only where `inputs_embeds` is None; whatever scales the
    embedding belongs in the embedding module.
    """
    model = subject.random()
    ids = random_ids(model, 2, 9)
    embeds = model.get_input_embeddings()(ids)
    close(model(inputs_embeds=embeds).logits, model(ids).logits)


@torch.no_grad()
def test_logits_of_some_tokens(subject: Subject) -> None:
    """`logits_to_keep` gives the logits of the last tokens, or of those whose indices it holds.

    Serves `generate`, which asks for the last alone if the signature has the name, and trainers
    that need those of the answer. Cure: `slice_logits_to_keep` before the head.
    """
    model = subject.random()
    ids = random_ids(model, 2, 9)
    logits, kept = model(ids).logits, torch.tensor([0, 3])
    close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    close(model(ids, logits_to_keep=kept).logits, logits[:, kept])


@torch.no_grad()
def test_hidden_states_and_attentions(subject: Subject) -> None:
    """Those of every layer are returned if asked for: L + 1 states, L times the weights.

    Serves interpretation and distillation. Cure: `_can_record_outputs` with `@capture_outputs` on
    the base model's `forward`; blocks take `hidden_states` by place.
    """
    model = subject.random()
    model.set_attn_implementation("eager")
    config, ids = model.config, random_ids(model, 2, 9)
    outputs = model(ids, output_hidden_states=True, output_attentions=True)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    shapes = [tuple(state.shape) for state in outputs.hidden_states]
    assert shapes == [(2, 9, config.hidden_size)] * (layers + 1)
    close(outputs.hidden_states[-1], model.base_model(ids).last_hidden_state)
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, heads, 9, 9)] * layers
    for weights in outputs.attentions:
        close(weights.sum(-1), torch.ones(2, heads, 9))
        assert not weights.triu(1).any()


@torch.no_grad()
def test_a_tuple_in_place_of_named_outputs(subject: Subject) -> None:
    """`return_dict=False` gives a tuple, the logits first.

    Serves exporters. Cure: `@can_return_tuple` on `forward`.
    """
    model = subject.random()
    ids = random_ids(model, 2, 9)
    outputs = model(ids, return_dict=False)
    assert isinstance(outputs, tuple)
    close(outputs[0], model(ids).logits)


def test_unknown_arguments_are_refused(subject: Subject) -> None:
    """A misspelt keyword argument raises a TypeError.

    Serves everyone: one that is swallowed changes the result without a word. Cure: compare
    `**kwargs` with those that transformers and the attention function know.
    """
    model = subject.random()
    with pytest.raises(TypeError, match="attention_masks"):
        model(random_ids(model, 1, 9), attention_masks=torch.ones(1, 9))


@torch.no_grad()
def test_arguments_reach_the_attention_function(subject: Subject) -> None:
    """An attention function that is registered is called, with the keyword arguments of `forward`.

    Serves flash attention's packed texts, continuous batching and vLLM. Cure: hand `**kwargs` down;
    take the function from `ALL_ATTENTION_FUNCTIONS`, and set `_supports_attention_backend = True`.
    """
    seen = []

    def attend(module: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("cu_seq_lens_q"))
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("contract", attend)
    model = subject.random()
    ids, lengths = random_ids(model, 1, 9), torch.tensor([0, 9])
    expected = model(ids).logits
    model.set_attn_implementation("contract")
    close(model(ids, cu_seq_lens_q=lengths).logits, expected)
    assert len(seen) == model.config.num_hidden_layers
    assert all(each is lengths for each in seen)


@pytest.mark.contract_slow
def test_continuous_batching(subject: Subject) -> None:
    """`generate_batch` writes for each prompt what `generate` writes.

    Serves servers. Cure: as for the attention function; let the cache be of any class.
    """
    model = subject.random()
    prompts = [random_ids(model, length).tolist() for length in (5, 9, 1)]
    config = GenerationConfig(
        max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=PADDING
    )
    small = ContinuousBatchingConfig(page_size=32, num_blocks=32, max_batch_tokens=64)
    answers = model.generate_batch(prompts, config, small, progress_bar=False)
    found = {tuple(answer.prompt_ids): answer.generated_tokens for answer in answers.values()}
    for prompt in prompts:
        ids = torch.tensor([prompt])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert found[tuple(prompt)] == alone[0, len(prompt) :].tolist()


@pytest.mark.contract_slow
@torch.no_grad()
def test_it_compiles_as_one_graph(subject: Subject) -> None:
    """`torch.compile(fullgraph=True)` takes a prompt and steps with a static cache.

    Serves fast generation: `generate` compiles the steps where the cache is static. Cure: no
    branches on values of tensors; `_can_compile_fullgraph = True`.
    """
    torch.compiler.reset()
    model = subject.random()
    assert model._can_compile_fullgraph
    ids, mask = left_padded(model)
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    cache = StaticCache(config=model.config, max_cache_len=16)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    pieces = []
    for start, end in [(0, 10), (10, 11), (11, 12)]:
        now = dict(attention_mask=mask[:, :end], position_ids=positions[:, start:end])
        pieces.append(step(ids[:, start:end], cache=cache, **now).logits)
    expected = model(ids, attention_mask=mask, position_ids=positions).logits
    close(torch.cat(pieces, dim=1)[mask.bool()], expected[mask.bool()])


@pytest.mark.contract_slow
@torch.no_grad()
def test_it_exports_with_lengths_that_vary(subject: Subject) -> None:
    """`torch.export` makes a program for any number of texts and tokens.

    Serves ONNX, ExecuTorch and others. Cure: as for compiling; take sizes from `shape`.
    """
    model = subject.random()
    ids, mask = left_padded(model)
    size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        model,
        (ids,),
        {"attention_mask": mask, "use_cache": False},
        dynamic_shapes={"input_ids": size, "attention_mask": size, "use_cache": None},
        strict=False,
    )
    other = random_ids(model, 3, 7)
    other_mask = torch.ones_like(other)
    logits = program.module()(other, attention_mask=other_mask, use_cache=False).logits
    close(logits, model(other, attention_mask=other_mask, use_cache=False).logits)
