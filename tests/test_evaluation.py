"""Perplexity by a sliding window, compared with GPT2LMHeadModel on the same weights."""

import math

import pytest
import torch
from transformers import GPT2LMHeadModel

from hf_scratch_gpt import ScratchGPTForCausalLM
from hf_scratch_gpt.evaluation import evaluate

from .models import random_gpt2, random_model

TEXT = "To be, or not to be: that is the question. Whether 'tis nobler in the mind to suffer\n"


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = random_gpt2(vocab_size=400, n_positions=32)
    model.loss_type = "ForCausalLM"
    return model


@pytest.fixture(scope="module")
def model(gpt2, tmp_path_factory) -> ScratchGPTForCausalLM:
    folder = tmp_path_factory.mktemp("gpt2")
    gpt2.save_pretrained(folder)
    return ScratchGPTForCausalLM.from_pretrained(folder)


def losses(gpt2, tokenizer, text: str, window: int, stride: int) -> list[float]:
    """-log p of each token that can be scored, in float64, by its definition."""
    ids, gpt2, found = tokenizer(text, return_tensors="pt").input_ids, gpt2.double(), []
    for token in range(1, ids.shape[1]):
        # The first window that reaches the token; its first one cannot be scored.
        begin = max(0, math.ceil((token + 1 - window) / stride)) * stride
        if token > begin:
            with torch.no_grad():
                logits = gpt2(ids[:, begin:token]).logits[0, -1]
            found.append(-logits.log_softmax(-1)[ids[0, token]].item())
    gpt2.float()
    return found


@pytest.mark.parametrize(("window", "stride"), [(32, 16), (32, 32), (32, 5), (9, 3), (32, 1)])
def test_each_token_counts_once(window, stride, gpt2, model, tiny_tokenizer):
    text = TEXT * 2
    expected = losses(gpt2, tiny_tokenizer, text, window, stride)
    done: list[float] = []
    result = evaluate(model, tiny_tokenizer, [(text, True, 170)], window, stride, done.append)
    assert result.scored_tokens == len(expected)
    assert result.nats_per_token == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nats_per_token))
    tokens = len(tiny_tokenizer(text).input_ids)
    bits = sum(expected) / len(expected) / math.log(2)
    assert result.bits_per_byte == pytest.approx(bits * tokens / len(text.encode()), abs=1e-5)
    assert (result.tokens, result.texts, result.bytes) == (tokens, 1, len(text))
    assert sum(done) == pytest.approx(170)


def test_it_is_the_recipe_of_the_documentation(gpt2, model, tiny_tokenizer):
    """transformers' perplexity page, the model's own loss by labels, 190 windows."""
    ids = tiny_tokenizer(TEXT * 60, return_tensors="pt").input_ids
    window, stride, total, count, before = 32, 16, 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + window, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : before - begin] = -100
        with torch.no_grad():
            loss = gpt2(ids[:, begin:end], labels=labels).loss
        scored = (labels != -100).sum().item() - 1
        total, count, before = total + loss.item() * scored, count + scored, end
        if end == ids.shape[1]:
            break
    result = evaluate(model, tiny_tokenizer, [(TEXT * 60, True, 1)])
    assert (result.window, result.stride) == (window, stride)
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)


def test_texts_are_scored_by_themselves_and_in_pieces(gpt2, model, tiny_tokenizer, monkeypatch):
    texts = [TEXT * 3, "Hello", TEXT]
    expected = [x for text in texts for x in losses(gpt2, tiny_tokenizer, text, 32, 16)]
    cut = TEXT.index(" that")
    pieces = [(TEXT * 2 + TEXT[:cut], False, 1), (TEXT[cut:], True, 0)]
    pieces += [(text, True, 1) for text in texts[1:]]
    monkeypatch.setattr("hf_scratch_gpt.evaluation.LONGEST_PIECE", 50)
    result = evaluate(model, tiny_tokenizer, pieces)
    assert result.nats_per_token == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    assert (result.texts, result.scored_tokens) == (3, len(expected))


@pytest.mark.parametrize(
    ("text", "sizes", "message"),
    [
        (TEXT, (33, None), "window of 33 tokens is not between 2 and the model's 32 positions"),
        (TEXT, (1, None), "window of 1 tokens"),
        (TEXT, (16, 17), "stride of 17 tokens is not between 1 and the window's 16"),
        (TEXT, (16, 0), "stride of 0 tokens"),
        ("!", (None, None), "nothing can be scored: the tokenizer makes 1 tokens of 1 bytes"),
    ],
)
def test_what_cannot_be_scored_is_refused(text, sizes, message, model, tiny_tokenizer):
    with pytest.raises(ValueError, match=message):
        evaluate(model, tiny_tokenizer, [(text, True, 1)], *sizes)


def test_a_broken_model_has_no_perplexity(tiny_tokenizer):
    model = random_model(ScratchGPTForCausalLM, vocab_size=400)
    model.lm_head.weight.data[5, 5] = math.nan
    with pytest.raises(ValueError, match="the loss is nan"):
        evaluate(model, tiny_tokenizer, [(TEXT, True, 1)])
