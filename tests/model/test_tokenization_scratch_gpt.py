"""The tokenizer against GPT2TokenizerFast and bare tiktoken on the same vocabulary."""

import base64
import copy
import json
import os
import pickle
from pathlib import Path

import pytest
import tiktoken
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Sequence
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    GPT2TokenizerFast,
    PreTrainedTokenizerFast,
)

from hf_scratch_gpt import ScratchGPTTokenizer
from hf_scratch_gpt.model.vocabulary_scratch_gpt import END_OF_TEXT

NASTY = [
    "",
    " ",
    "Hello, world! It's 2019; we'll see: I'VE 'seen' y'all've.",
    "  leading and   many   spaces \t\ttabs\n\n\nlines\r\n trailing   ",
    "naïve café\u0301 Ångström ﬁ ½ ① \u00a0\u2003\u3000\x85\u2028 odd spaces",
    "你好，世界。こんにちは 안녕하세요",
    "👩‍👩‍👧‍👦 😀😃 🇩🇪 ✌🏽 e\u0301\u0302\u0303",
    "مرحبا بالعالم שלום",
    "\x00\x01\x1c\x1f\x7f NUL and friends \ufffd \ufeff \U0010ffff",
    "<|endoftext|>",
    f"before{END_OF_TEXT}after {END_OF_TEXT} {END_OF_TEXT}{END_OF_TEXT}",
    "<|endoftext <|endoftext|",
    "a" * 300 + "1" * 300 + "!" * 300 + "\n" * 300 + "x",
]
REPEATABLE = dict(derandomize=True, database=None)
SPLIT_ROWS = [["Hello", "world"], ["a", "", "bc", "naïve 😀"], ["one"]]


def files_of(folder: Path) -> tuple[str, str]:
    return str(folder / "encoder.json"), str(folder / "vocab.bpe")


def make_pair(folder: Path) -> tuple[ScratchGPTTokenizer, GPT2TokenizerFast]:
    fast = GPT2TokenizerFast(*files_of(folder), pad_token=END_OF_TEXT, padding_side="left")
    return ScratchGPTTokenizer(*files_of(folder)), fast


@pytest.fixture(scope="module", params=["tiny", "real"])
def pair(request, openai_tiny):
    """Our tokenizer and transformers', on one vocabulary."""
    if request.param == "tiny":
        return make_pair(openai_tiny)
    if not os.environ.get("GPT2_RELEASE_DIR"):
        pytest.skip("GPT2_RELEASE_DIR does not name the folder of OpenAI's 117M release")
    return make_pair(Path(os.environ["GPT2_RELEASE_DIR"]))


def assert_same(ours, fast, *texts, **arguments):
    """Every output, and the alignment, of `texts`."""
    encoded, expected = ours(*texts, **arguments), fast(*texts, **arguments)
    assert set(encoded) == set(expected)
    for name, values in expected.items():
        if isinstance(values, torch.Tensor):
            assert torch.equal(encoded[name], values), name
        else:
            assert encoded[name] == values, name
    for row, wanted in enumerate(expected.encodings):
        for alignment in ("offsets", "word_ids", "tokens", "sequence_ids"):
            assert getattr(encoded.encodings[row], alignment) == getattr(wanted, alignment)


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_nasty_texts_equal_gpt2s(pair, text):
    ours, fast = pair
    assert_same(ours, fast, text)
    assert_same(ours, fast, text, return_offsets_mapping=True, return_special_tokens_mask=True)
    assert_same(ours, fast, text, split_special_tokens=True)
    ids = ours(text).input_ids
    assert ours.decode(ids) == fast.decode(ids) == text
    assert ours.decode(ids, skip_special_tokens=True) == text.replace(END_OF_TEXT, "")
    assert ours.tokenize(text) == fast.tokenize(text)


# Four hundred lists of fifty are 20,000 strings.
@pytest.mark.long
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), **REPEATABLE)
@given(texts=st.lists(st.text(max_size=40), min_size=50, max_size=50))
def test_random_texts_equal_gpt2s_and_tiktokens(pair, texts):
    ours, fast = pair
    expected = fast(texts, return_offsets_mapping=True, return_special_tokens_mask=True)
    batch = ours(texts)
    assert batch.input_ids == expected.input_ids
    assert batch.attention_mask == expected.attention_mask
    assert ours(texts[0]).input_ids == expected.input_ids[0]
    aligned = ours(texts, return_offsets_mapping=True, return_special_tokens_mask=True)
    assert dict(aligned) == dict(expected)
    for row, text in enumerate(texts):
        assert batch.word_ids(row) == expected.word_ids(row)
        if END_OF_TEXT not in text:  # hypothesis draws strings of our source, too
            assert ours.tiktoken.encode_ordinary(text) == expected.input_ids[row]
        assert ours.decode(batch.input_ids[row]) == text
    assert ours.batch_decode(batch.input_ids) == fast.batch_decode(expected.input_ids)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(padding=True),
        dict(padding=True, padding_side="right"),
        dict(padding=True, pad_to_multiple_of=8),
        dict(padding="max_length", max_length=9, truncation=True),
        dict(padding="max_length", max_length=400),
        dict(truncation=True, max_length=5),
        dict(truncation="only_first", max_length=1, padding=True),
        dict(truncation=True, max_length=6, return_overflowing_tokens=True, stride=2),
        dict(padding=True, truncation=True, max_length=7, return_tensors="pt"),
        dict(return_length=True),
        dict(return_token_type_ids=True),
        dict(return_attention_mask=False),
        dict(add_special_tokens=False),
        dict(split_special_tokens=True, padding=True),
        dict(return_special_tokens_mask=True, return_offsets_mapping=True),
    ],
    ids=str,
)
def test_arguments_work_as_gpt2s(pair, arguments):
    assert_same(*pair, NASTY[2:], **arguments)
    assert_same(*pair, tuple(NASTY[2:4]), **arguments)
    for side in ("left", "right"):
        for tokenizer in pair:
            tokenizer.truncation_side = side
        assert_same(*pair, NASTY[2], **arguments)


def test_pairs_and_split_words(pair):
    for tokenizer in pair:
        tokenizer.truncation_side = "right"
    firsts, seconds = NASTY[2:6], NASTY[4:8]
    assert_same(*pair, firsts, seconds, padding=True)
    assert_same(*pair, firsts[0], seconds[0])
    assert_same(*pair, firsts, seconds, truncation="longest_first", max_length=9)
    assert_same(*pair, SPLIT_ROWS, is_split_into_words=True, return_offsets_mapping=True)


@pytest.mark.parametrize(
    ("text", "read_as"),
    [("\ud83d", "\ufffd"), ("a\ud800b\udc00", "a\ufffdb\ufffd"), ("\ud83d\ude00 ok", "😀 ok")],
)
def test_surrogates_have_a_defined_result(pair, text, read_as):
    ours = pair[0]
    assert ours(text).input_ids == ours(read_as).input_ids
    assert ours([text, "x"]).input_ids[0] == ours(read_as).input_ids
    assert ours(text, return_offsets_mapping=True).input_ids == ours(read_as).input_ids
    assert ours([[text]], is_split_into_words=True).input_ids[0] == ours(read_as).input_ids
    assert ours.decode(ours(text).input_ids) == read_as


@pytest.mark.long
@pytest.mark.parametrize("repeated", ["a", "ab", " ", "\n", "\x00"], ids=repr)
def test_a_million_characters_without_a_break(pair, repeated, logged_warnings):
    ours, fast = pair
    run = repeated * (10**6 // len(repeated))
    for text in (run, f"x{run}", f"{run}x") if repeated.isspace() else [run]:
        ids = ours(text).input_ids
        assert ids == fast(text).input_ids
        assert ours.decode(ids) == text


def test_added_tokens(openai_tiny):
    ours, fast = make_pair(openai_tiny)
    for tokenizer in (ours, fast):
        tokenizer.add_tokens(["<new>", "grape", *(f"<w{number}>" for number in range(100))])
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>"]})
    text = "a <new>b grapes <|user|> c<w7>"
    assert len(ours) == len(fast) == 503
    assert_same(ours, fast, [text, "plain"], padding=True)
    assert_same(ours, fast, text, split_special_tokens=True)
    assert ours.decode(ours(text).input_ids, skip_special_tokens=True) == "a <new>b grapes  c<w7>"


def test_chat_template(openai_tiny):
    ours, fast = make_pair(openai_tiny)
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi 😀"}]
    ours.chat_template = fast.chat_template = template
    encoded = ours.apply_chat_template(chat, tokenize=True, return_dict=True)
    assert dict(encoded) == dict(fast.apply_chat_template(chat, tokenize=True, return_dict=True))
    assert ours.decode(encoded["input_ids"]) == "user: Hello\nassistant: Hi 😀\n"


def test_copies_and_processes(tiny_tokenizer):
    before = Hasher.hash(tiny_tokenizer)
    for other in (copy.deepcopy(tiny_tokenizer), pickle.loads(pickle.dumps(tiny_tokenizer))):
        assert other(NASTY).input_ids == tiny_tokenizer(NASTY).input_ids
        assert other.tiktoken.encode_ordinary("Hello") == tiny_tokenizer("Hello").input_ids
    texts = NASTY * 20
    encoded = Dataset.from_dict({"text": texts}).map(
        lambda rows: tiny_tokenizer(rows["text"]), batched=True, num_proc=2, batch_size=50
    )
    assert list(encoded["input_ids"]) == tiny_tokenizer(texts).input_ids
    assert Hasher.hash(tiny_tokenizer) == before


def test_save_and_reload_three_ways(pair, tmp_path):
    ours = copy.deepcopy(pair[0])
    ours.add_tokens(["<new>"])
    ours.model_max_length = 7777
    ours(["a b c", "d"], ["x", "y"], padding=True, truncation=True, max_length=3)
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert (saved["truncation"], saved["padding"]) == (None, None)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is ScratchGPTTokenizer
    texts = [*NASTY, "a<new>b"]
    for other in (loaded, PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        assert other(texts).input_ids == ours(texts).input_ids
        assert (other.padding_side, other.model_max_length) == ("left", 7777)
        assert other.pad_token == END_OF_TEXT
    (tmp_path / "pair").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).rename(tmp_path / "pair" / name)
    gpt2 = GPT2TokenizerFast.from_pretrained(tmp_path / "pair")
    assert gpt2(NASTY).input_ids == ours(NASTY).input_ids


def test_loads_every_format(pair, tmp_path):
    ours, fast = pair
    fast.save_pretrained(tmp_path / "json")  # a tokenizer.json alone
    assert not (tmp_path / "json" / "vocab.json").exists()
    loaded = ScratchGPTTokenizer.from_pretrained(tmp_path / "json")
    assert loaded(NASTY).input_ids == ours(NASTY).input_ids
    assert loaded.pad_token == END_OF_TEXT

    tokens = sorted(ours.tiktoken._mergeable_ranks, key=ours.tiktoken._mergeable_ranks.get)
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    end = f"{base64.b64encode(END_OF_TEXT.encode()).decode()} {len(lines)}"
    for written in (lines, [*lines, end]):
        (tmp_path / "a.tiktoken").write_text("\n".join(written))
        for place in (tmp_path / "a.tiktoken", tmp_path):
            loaded = ScratchGPTTokenizer.from_pretrained(place)
            assert loaded(NASTY).input_ids == ours(NASTY).input_ids
    (tmp_path / "b.tiktoken").write_text("")
    with pytest.raises(ValueError, match=r"several vocabularies: a\.tiktoken, b\.tiktoken"):
        ScratchGPTTokenizer.from_pretrained(tmp_path)


def test_ids_that_do_not_follow_the_merges_are_exact(openai_tiny, tmp_path):
    encoder = json.loads((openai_tiny / "encoder.json").read_text())
    shuffled = {token: (token_id * 7 + 3) % 400 for token, token_id in encoder.items()}
    (tmp_path / "encoder.json").write_text(json.dumps(shuffled))
    (tmp_path / "vocab.bpe").write_text((openai_tiny / "vocab.bpe").read_text())
    ours, fast = make_pair(tmp_path)
    assert_same(ours, fast, NASTY, padding=True)
    assert ours.decode(ours(NASTY[4]).input_ids) == NASTY[4]
    ours.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again(NASTY).input_ids == ours(NASTY).input_ids


def test_training_a_new_vocabulary(tiny_tokenizer, tmp_path):
    texts = [["the cat sat on the mat"] * 50]
    trained = tiny_tokenizer.train_new_from_iterator(texts, 271, new_special_tokens=["SEP"])
    assert type(trained) is ScratchGPTTokenizer
    assert trained.decode(trained("the cat 😀").input_ids) == "the cat 😀"
    trained.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("aSEPb").input_ids == trained("aSEPb").input_ids


def test_tiktoken_is_public(pair):
    encoding = pair[0].tiktoken
    assert isinstance(encoding, tiktoken.Encoding)
    assert encoding.encode(END_OF_TEXT, allowed_special="all") == [pair[0].eos_token_id]
    assert encoding.n_vocab == len(pair[0])


@pytest.mark.parametrize("toggled_later", [False, True])
def test_added_begin_of_text_survives_saving(toggled_later, openai_tiny, tmp_path):
    files = files_of(openai_tiny)
    ours = ScratchGPTTokenizer(*files, add_bos_token=not toggled_later)
    ours.add_bos_token = True
    ours.save_pretrained(tmp_path)
    expected = GPT2TokenizerFast(*files, add_bos_token=True)("hi").input_ids
    assert ours("hi").input_ids == expected
    assert expected[0] == ours.bos_token_id
    for loader in (AutoTokenizer, PreTrainedTokenizerFast, ScratchGPTTokenizer):
        assert loader.from_pretrained(tmp_path)("hi").input_ids == expected


def test_tokenizer_json_alone_brings_everything(openai_tiny, tmp_path):
    files = files_of(openai_tiny)
    fast = GPT2TokenizerFast(*files, add_prefix_space=True)
    fast.add_tokens(["<x>", "grape"])
    fast.save_pretrained(tmp_path)
    texts = ["hello <x> grapes", "x", " x"]
    for ours in (
        ScratchGPTTokenizer.from_pretrained(pretrained_model_name_or_path=tmp_path),
        ScratchGPTTokenizer(tokenizer_file=str(tmp_path / "tokenizer.json")),
        ScratchGPTTokenizer(tokenizer_object=fast.backend_tokenizer),
    ):
        assert len(ours) == 402
        assert ours(texts).input_ids == fast(texts).input_ids
        assert ours(texts, padding=True).attention_mask[1][0] == 0  # fast has no pad token
    ours = ScratchGPTTokenizer(*files, add_prefix_space=True)
    assert ours(["Hello", " Hello"]).input_ids == fast(["Hello", " Hello"]).input_ids


def test_alignment_stays_that_of_the_ids(openai_tiny):
    ours, _ = make_pair(openai_tiny)
    texts = ["one two three", "four"]
    arguments = dict(padding=True, truncation=True, max_length=4)
    encoded, expected = ours(texts, **arguments), ours(texts, **arguments)
    tokens = [expected.tokens(row) for row in range(2)]
    texts[0] = "changed"
    ours.add_bos_token = True
    ours.truncation_side, ours.padding_side = "left", "right"
    ours.add_tokens(["one"])
    ours("another", truncation=True, max_length=1, return_overflowing_tokens=True)
    assert [encoded.tokens(row) for row in range(2)] == tokens
    assert [pickle.loads(pickle.dumps(encoded)).tokens(row) for row in range(2)] == tokens
    assert ours.convert_tokens_to_ids(tokens[1]) == encoded.input_ids[1]


def test_model_input_names_decide_what_is_returned(openai_tiny):
    ours, fast = make_pair(openai_tiny)
    for names in (["input_ids"], ["input_ids", "token_type_ids", "attention_mask"]):
        ours.model_input_names = fast.model_input_names = names
        assert dict(ours(NASTY)) == dict(fast(NASTY))


def test_bad_arguments_are_refused_as_gpt2s(pair):
    for tokenizer in pair:
        for bad in (dict(padding=True, padding_side="foo"), dict(truncation=True, max_length=-1)):
            with pytest.raises((ValueError, OverflowError, TypeError)):
                tokenizer(["a b", "c"], **bad)
        with pytest.raises(ValueError, match="batch length"):
            tokenizer(["a", "b"], [])


def train(backend):
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=ByteLevel.alphabet())
    backend.train_from_iterator(["numbers like 1234 and other things than cats"] * 9, trainer)


def cut_merges(backend):
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    backend.model = models.BPE(model["vocab"], merges[:-40])


CHANGES = {
    "normalizer": lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()),
    "dropout": lambda backend: setattr(backend.model, "dropout", 1.0),
    "splitter": lambda backend: setattr(
        backend, "pre_tokenizer", Sequence([pre_tokenizers.Digits(True), ByteLevel(False)])
    ),
    "space": lambda backend: setattr(backend.pre_tokenizer, "add_prefix_space", True),
    "no pattern": lambda backend: setattr(backend.pre_tokenizer, "use_regex", False),
    "begin": lambda backend: setattr(
        backend,
        "post_processor",
        TemplateProcessing(f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 399)]),
    ),
    "twice": lambda backend: setattr(backend, "post_processor", TemplateProcessing("$A $A")),
    "token": lambda backend: backend.add_tokens(["cat", AddedToken("1", single_word=True)]),
    "special token": lambda backend: backend.add_special_tokens(["cat"]),
    "cut": lambda backend: backend.enable_truncation(3),
    "padded": lambda backend: backend.enable_padding(length=50),
    "trained": train,
    "fewer merges": cut_merges,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_backend_counts(change, openai_tiny, tmp_path):
    ours, fast = make_pair(openai_tiny)
    for tokenizer in (ours, fast):
        CHANGES[change](tokenizer.backend_tokenizer)
    texts = ["The Cat in 1234 HATS, the 1 and other things", *NASTY]
    assert_same(ours, fast, texts)
    assert_same(ours, fast, texts, padding=True, truncation=True, max_length=7)
    if change == "trained":
        return  # the end of text is not in the new vocabulary, and has its old id until it is saved
    others = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    if change != "fewer merges":  # refused, as it has tokens that no merge makes
        ours.save_pretrained(tmp_path)
        others.append(AutoTokenizer.from_pretrained(tmp_path))
        others.append(PreTrainedTokenizerFast.from_pretrained(tmp_path))
    for other in others:
        assert other(texts).input_ids == fast(texts).input_ids


def test_training_keeps_what_was_set(openai_tiny):
    texts, trained = [["The Cat sat on the Mat 1234"] * 50], []
    for tokenizer in make_pair(openai_tiny):
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        trained.append(tokenizer.train_new_from_iterator(texts, 280))
    assert_same(*trained, ["THE CAT", *NASTY])


@pytest.mark.parametrize("join", [tuple, " ".join])
def test_vocabulary_as_objects(join, openai_tiny, tmp_path):
    vocab = json.loads((openai_tiny / "encoder.json").read_text())
    merges = (openai_tiny / "vocab.bpe").read_text().split("\n")[1:-1]
    merges = [tuple(merge.split(" ")) for merge in merges]
    fast = GPT2TokenizerFast(vocab=vocab, merges=merges)
    for ours in (
        ScratchGPTTokenizer(vocab=vocab, merges=[*map(join, merges)]),
        ScratchGPTTokenizer(vocab, [*map(join, merges)]),
    ):
        assert_same(ours, fast, NASTY)
        ours.save_pretrained(tmp_path)
        assert AutoTokenizer.from_pretrained(tmp_path)(NASTY).input_ids == ours(NASTY).input_ids


def test_form_of_vocabulary(openai_tiny):
    # Tools read a class's `model` to know whether `vocab` is a dictionary or scores of tokens.
    assert ScratchGPTTokenizer.model is GPT2TokenizerFast.model
    vocab = json.loads((openai_tiny / "encoder.json").read_text())
    with pytest.raises(ValueError, match="vocab is a list; give a dictionary"):
        ScratchGPTTokenizer(vocab=[(token, 0.0) for token in vocab], merges=[])


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions"])
def test_truncation_ends_at_the_positions_of_the_model_beside(name, openai_tiny, tmp_path):
    ScratchGPTTokenizer(*files_of(openai_tiny)).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "scratch_gpt", name: 32}))
    for loader in (ScratchGPTTokenizer, AutoTokenizer):
        loaded = loader.from_pretrained(tmp_path)
        assert len(loaded("a b c " * 50, truncation=True).input_ids) == 32
        assert loader.from_pretrained(tmp_path, model_max_length=40).model_max_length == 40
