"""Writing on past the context window, and the pieces in which text comes."""

import re
import time

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    GPT2TokenizerFast,
    PreTrainedTokenizerFast,
    StoppingCriteria,
)

from hf_scratch_gpt import ScratchGPTForCausalLM
from hf_scratch_gpt.characters import character_tokenizer
from hf_scratch_gpt.evaluation import evaluate
from hf_scratch_gpt.inspection import inspect
from hf_scratch_gpt.model.vocabulary_scratch_gpt import BYTE_TO_UNICODE, token_bytes
from hf_scratch_gpt.writing import write

from .models import random_model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return random_model(
        ScratchGPTForCausalLM, vocab_size=400, max_position_embeddings=16, eos_token_id=None
    )


@torch.no_grad()
def greedy(model, ids, count, banned=None):
    """The likeliest tokens after `ids`, read anew for each, a half window at a time."""
    window, written, ids = model.config.max_position_embeddings, [], list(ids)
    for _ in range(count):
        if len(ids) >= window:
            ids = ids[-window // 2 :]
        logits = model(torch.tensor([ids])).logits[0, -1]
        if banned is not None:
            logits[[*ids, *banned]] = -torch.inf
        ids.append(logits.argmax().item())
        written.append(ids[-1])
    return written


@pytest.mark.parametrize("prompt", ["Hello, world", "A long prompt, longer than the window. " * 3])
def test_text_goes_on_past_the_window(prompt, model, tiny_tokenizer):
    pieces = []
    text = write(model, tiny_tokenizer, prompt, 50, pieces.append, do_sample=False)
    assert text == tiny_tokenizer.decode(greedy(model, tiny_tokenizer(prompt).input_ids, 50))
    assert "".join(pieces) == text
    assert len(pieces) > 5


class Ends(StoppingCriteria):
    def __init__(self, last):
        self.last = last

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.last


@pytest.mark.parametrize("way", ["end of text", "criterion", "string"])
@pytest.mark.parametrize("place", [11, 12, 18, 20])  # 12 and 20 fill the window
def test_what_ends_generate_ends_the_text(place, way, model, tiny_tokenizer):
    prompt = tiny_tokenizer("Hello").input_ids
    assert len(prompt) + 12 == 16
    vocab = tiny_tokenizer.get_vocab()  # of which parts of characters are left out
    parts = [number for token, number in vocab.items() if not token_bytes(token).isascii()]
    ids = greedy(model, prompt, 40, banned=parts)
    assert ids.index(ids[place - 1]) == place - 1
    options = dict(do_sample=False, no_repeat_ngram_size=1, suppress_tokens=parts)
    if way == "end of text":
        options |= dict(eos_token_id=ids[place - 1])
    elif way == "criterion":
        options |= dict(stopping_criteria=[Ends(ids[place - 1])])
    else:  # over three pieces
        options |= dict(stop_strings=[tiny_tokenizer.decode(ids[place - 3 : place])])
    written = write(model, tiny_tokenizer, "Hello", 40, **options)
    assert written == tiny_tokenizer.decode(ids[:place])


def test_time_is_that_of_all_windows(model, tiny_tokenizer):
    started = time.monotonic()
    write(model, tiny_tokenizer, "Hello", 10**6, do_sample=False, max_time=0.5)
    assert time.monotonic() - started < 5


def metaspace():
    """A vocabulary of whole words, written as sentencepiece writes them, and of bytes."""
    words = ["Hello", "world", "of", "spaces", "ly"]
    tokens = [*(f"▁{word}" for word in words), "ly", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="ly"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("text", [" world of spacesly world", " of é 😀 日本 of", "ly 日本of"])
def test_pieces_keep_their_spaces(text):
    tokenizer = metaspace()
    ids = []
    for word in re.findall(r" ?[a-z]+?(?=ly|of|\b)| |.", text):
        token = tokenizer.get_vocab().get(word.replace(" ", "▁"))
        ids += [token] if token is not None else [6 + byte for byte in word.encode()]
    assert tokenizer.decode([0, *ids]) == "Hello" + text
    pieces = []
    assert write(Parrot(ids), tokenizer, "Hello", len(ids), pieces.append) == text
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_tokenizer_without_a_vocabulary_is_named(tmp_path):
    tokenizer = GPT2TokenizerFast(name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}' has no vocabulary"):
        write(Parrot([]), tokenizer, "Hello")
    with pytest.raises(ValueError, match="'' has 0 tokens"):
        write(Parrot([]), metaspace(), "")


def test_characters_that_a_vocabulary_lacks_are_named(model):
    """Wherever a text is encoded: to write, to look inside, to measure, to train."""
    tokenizer = character_tokenizer({"a": 0, "b": 1, "|": 2}, eos_token="|")
    for call in (
        lambda text: write(model, tokenizer, text),
        lambda text: inspect(model, tokenizer, text),
        lambda text: evaluate(model, tokenizer, [(text, True, 1)]),
    ):
        with pytest.raises(ValueError, match="no token is 'c', '語'; leave out such characters"):
            call("a語cb")


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
        self.generation_config = GenerationConfig()

    def generate(self, ids, max_new_tokens, streamer, **_):
        streamer.put(ids)
        for token in self.ids[:max_new_tokens]:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return torch.cat([ids, torch.tensor([self.ids[:max_new_tokens]])], dim=1)
