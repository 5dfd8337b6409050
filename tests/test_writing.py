"""Writing on past the context window, and the pieces in which text comes."""

import pytest
import torch

from hf_scratch_gpt import ScratchGPTForCausalLM
from hf_scratch_gpt.model.vocabulary_scratch_gpt import BYTE_TO_UNICODE
from hf_scratch_gpt.writing import write

from .models import random_model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return random_model(
        ScratchGPTForCausalLM, vocab_size=400, max_position_embeddings=16, eos_token_id=None
    )


def greedy(model, ids, count):
    """The likeliest tokens after `ids`, read anew for each, a half window at a time."""
    window, written, ids = model.config.max_position_embeddings, [], list(ids)
    for _ in range(count):
        if len(ids) >= window:
            ids = ids[-window // 2 :]
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        written.append(ids[-1])
    return written


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["Hello, world", "A long prompt, longer than the window. " * 3])
def test_text_goes_on_past_the_window(prompt, model, tiny_tokenizer):
    pieces = []
    text = write(model, tiny_tokenizer, prompt, 50, pieces.append, do_sample=False)
    assert text == tiny_tokenizer.decode(greedy(model, tiny_tokenizer(prompt).input_ids, 50))
    assert "".join(pieces) == text
    assert len(pieces) > 5


def test_the_end_of_text_ends_it(model, tiny_tokenizer):
    ids = greedy(model, tiny_tokenizer("Hello").input_ids, 30)
    model.generation_config.eos_token_id = ids[20]
    try:
        text = write(model, tiny_tokenizer, "Hello", 30, do_sample=False)
    finally:
        model.generation_config.eos_token_id = None
    assert text == tiny_tokenizer.decode(ids[: ids.index(ids[20]) + 1])


def test_characters_come_whole(tiny_tokenizer):
    """A model that writes one byte a token gives no piece with half a character."""
    text = "né 😀 日本 a"
    ids = [tiny_tokenizer.get_vocab()[BYTE_TO_UNICODE[byte]] for byte in text.encode()]
    assert tiny_tokenizer.decode(ids) == text
    pieces = []
    assert write(Parrot(ids), tiny_tokenizer, "Hello", len(ids), pieces.append) == text
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) == len(text)


class Parrot:
    """Has the interface of a model as `write` uses it, and says what it is told."""

    device = torch.device("cpu")

    def __init__(self, ids):
        self.ids = list(ids)
        self.config = type("Config", (), {"max_position_embeddings": 1000})
        self.generation_config = type("GenerationConfig", (), {"eos_token_id": None})

    def generate(self, ids, attention_mask, max_new_tokens, streamer):
        streamer.put(ids)
        for token in self.ids[:max_new_tokens]:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return torch.cat([ids, torch.tensor([self.ids[:max_new_tokens]])], dim=1)
