"""Writing on past the context window, and the pieces in which text comes."""

import pytest
import torch

from hf_scratch_gpt import ScratchGPTForCausalLM, ScratchGPTTokenizer
from hf_scratch_gpt.writing import write

from .models import random_model


@pytest.fixture(scope="module")
def tokenizer(openai_tiny):
    return ScratchGPTTokenizer.from_pretrained(openai_tiny)


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
def test_text_goes_on_past_the_window(prompt, model, tokenizer):
    pieces = []
    text = write(model, tokenizer, prompt, 50, pieces.append, do_sample=False)
    assert text == tokenizer.decode(greedy(model, tokenizer(prompt).input_ids, 50))
    assert "".join(pieces) == text
    assert len(pieces) > 5


def test_sampling_is_reproducible(model, tokenizer):
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(write(model, tokenizer, "Hello", 40, do_sample=True, top_k=40))
    assert texts[0] == texts[1] != texts[2]


def test_the_end_of_text_ends_it(model, tokenizer):
    ids = greedy(model, tokenizer("Hello").input_ids, 30)
    model.generation_config.eos_token_id = ids[20]
    try:
        text = write(model, tokenizer, "Hello", 30, do_sample=False)
    finally:
        model.generation_config.eos_token_id = None
    assert text == tokenizer.decode(ids[: ids.index(ids[20]) + 1])


def test_characters_come_whole(tokenizer):
    """A model that writes one byte a token gives no piece with half a character."""
    text = "né 😀 日本 a"
    ids = [tokenizer.get_vocab()[token] for token in byte_tokens(text)]
    assert tokenizer.decode(ids) == text
    pieces = []
    assert write(Parrot(ids), tokenizer, "Hello", len(ids), pieces.append) == text
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) == len(text)


def byte_tokens(text):
    """The tokens of the single bytes of `text`, in GPT-2's alphabet of bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable}
    alphabet |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    return [alphabet[byte] for byte in text.encode()]


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


def test_bad_arguments(model, tokenizer):
    with pytest.raises(ValueError, match="the prompt '' has 0 tokens; give at least one"):
        write(model, tokenizer, "")
    with pytest.raises(ValueError, match="max_new_tokens=0 is below 1"):
        write(model, tokenizer, "Hello", 0)
