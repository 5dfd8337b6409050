"""Damaged and contradictory vocabularies are refused with the file and the line or token."""

import base64
import json
import re
import shutil

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from hf_scratch_gpt import ScratchGPTTokenizer
from hf_scratch_gpt.model.vocabulary_scratch_gpt import BYTE_TO_UNICODE, token_bytes


@pytest.fixture
def folder(openai_tiny, tmp_path):
    """A vocabulary to spoil, as transformers names the files."""
    shutil.copy(openai_tiny / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(openai_tiny / "vocab.bpe", tmp_path / "merges.txt")
    return tmp_path


def edit_vocab(**changes):
    def spoil(folder):
        vocab = json.loads((folder / "vocab.json").read_text())
        for token, token_id in changes.items():
            if token_id is None:
                del vocab[token]
            else:
                vocab[token] = token_id
        (folder / "vocab.json").write_text(json.dumps(vocab))

    return spoil


def cut(name, size):
    def spoil(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return spoil


def edit_line(number, line):
    def spoil(folder):
        lines = (folder / "merges.txt").read_text().split("\n")
        lines[number - 1] = line
        (folder / "merges.txt").write_text("\n".join(lines))

    return spoil


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


SPOILT = {
    "no vocabulary": (lambda f: (f / "vocab.json").unlink(), r"takes vocab.json and merges.txt"),
    "no merges": (lambda f: (f / "merges.txt").unlink(), r"takes vocab.json and merges.txt"),
    "cut vocabulary": (cut("vocab.json", 1000), r"vocab\.json is not complete JSON at line 1, col"),
    "cut merges": (
        cut("merges.txt", 400),
        r"merges\.txt, line \d+ (merges|is not two)|no merge that",
    ),
    "cut between lines": (
        lambda f: edit_line(100, "")(f) or cut("merges.txt", 300)(f),
        r"merges\.txt",
    ),
    "empty merges": (write("merges.txt", b""), r"merges\.txt has no merge that makes token"),
    "not UTF-8": (
        write("merges.txt", b"#version\n\xff\xfe a\n"),
        r"merges\.txt is not UTF-8 at byte 9",
    ),
    "vocabulary not UTF-8": (write("vocab.json", b'{"\xff": 1}'), r"vocab\.json is not UTF-8"),
    "a list": (write("vocab.json", b"[1, 2]"), r"vocab\.json is not a JSON object"),
    "token twice": (write("vocab.json", b'{"a": 0, "a": 1}'), r"vocab\.json has 'a' twice"),
    "gap": (edit_vocab(**{"<|endoftext|>": 500}), r"vocab\.json has no token with id 399"),
    "id twice": (
        edit_vocab(**{"<|endoftext|>": 5}),
        r"tokens '&' and '<\|endoftext\|>' share id 5",
    ),
    "no number": (edit_vocab(**{"<|endoftext|>": "x"}), r"'<\|endoftext\|>' has 'x' for an id"),
    "no byte": (edit_vocab(**{"!": None, "<x>": 0}), r"byte 0x21 has no token"),
    "unknown token": (edit_line(3, "zq zq"), r"merges\.txt, line 3 merges 'zq' and 'zq', but 'zq'"),
    "one token": (edit_line(4, "abc"), r"merges\.txt, line 4 is not two tokens.*'abc'"),
    "merge twice": (edit_line(9, "- -"), r"merges\.txt, line 9 makes '--', which an earlier"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_refused_with_file_and_place(case, folder):
    spoil, message = SPOILT[case]
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        ScratchGPTTokenizer.from_pretrained(folder)


def test_merge_out_of_order(folder):
    lines = (folder / "merges.txt").read_text().split("\n")
    made = {line.replace(" ", ""): number for number, line in enumerate(lines)}
    number = next(
        number
        for number, line in enumerate(lines)
        if number > 2 and any(made.get(part, 0) > 1 for part in line.split(" "))
    )
    lines.insert(1, lines.pop(number))
    (folder / "merges.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"line 2 merges .* which no earlier merge has made"):
        ScratchGPTTokenizer.from_pretrained(folder)


def test_a_list_that_tiktoken_would_read_otherwise(tmp_path):
    # "bc" comes first, so "abc" never becomes "ab" and "c"; tiktoken would join "a" and "bc".
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    tokens = [*BYTE_TO_UNICODE.values(), "bc", "ab", "abc"]
    vocab = {token: number for number, token in enumerate(tokens)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("\n".join(map(" ".join, merges)))
    with pytest.raises(ValueError, match=r"merges.txt, line 3 makes 'abc'.*\['a', 'bc'\]"):
        ScratchGPTTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not base64! 5", r"line 3 is not a token in base64 and its rank"),
        ("YQ== five", r"line 3 is not a token"),
        ("YQ==", r"line 3 is not a token"),
        (f"{base64.b64encode(b'a').decode()} 999", r"line \d+ has token b'a' a second time"),
        (f"{base64.b64encode(b'xyz').decode()} 300", r"has no token with id 256"),
        (f"{base64.b64encode(b'xyz').decode()} 256", r"no two tokens of lower rank make b'xyz'"),
    ],
)
def test_bad_rank_files(line, message, tmp_path):
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    lines.insert(2 if "line 3" in message else 256, line)
    (tmp_path / "bad.tiktoken").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"bad\.tiktoken.*{message}"):
        ScratchGPTTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("model", "splitter", "found"),
    [
        (models.WordLevel({"a": 0}, unk_token="a"), pre_tokenizers.ByteLevel(), "WordLevel"),
        (models.BPE(), pre_tokenizers.Whitespace(), "Whitespace"),
        (models.BPE(), pre_tokenizers.ByteLevel(use_regex=False), "pattern"),
        (models.BPE(dropout=0.1), pre_tokenizers.ByteLevel(), "dropout"),
    ],
)
def test_other_kinds_of_tokenizer_are_refused(model, splitter, found, tmp_path):
    other = Tokenizer(model)
    other.pre_tokenizer = splitter
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=rf"not a byte-level BPE tokenizer of GPT-2's .*{found}"):
        ScratchGPTTokenizer.from_pretrained(tmp_path)


def test_bytes_and_their_characters():
    assert sorted(token_bytes(character) for character in BYTE_TO_UNICODE.values()) == [
        bytes([byte]) for byte in range(256)
    ]
    assert (BYTE_TO_UNICODE[ord(" ")], BYTE_TO_UNICODE[ord("\n")]) == ("Ġ", "Ċ")
    assert all(re.fullmatch(r"\S", character) for character in BYTE_TO_UNICODE.values())


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "BPE", "vocab": None, "merges": []}},
        {"model": {"type": "BPE", "vocab": ["a"], "merges": []}},
        {"added_tokens": [None]},
        {"added_tokens": ["x"]},
        {"pre_tokenizer": "ByteLevel"},
    ],
    ids=str,
)
def test_malformed_tokenizer_json(change, openai_tiny, tmp_path):
    ScratchGPTTokenizer.from_pretrained(openai_tiny).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    path = tmp_path / "other.json"
    path.write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=r"other\.json"):
        ScratchGPTTokenizer(tokenizer_file=str(path))
    merges = {"model": {**content["model"], "merges": [1, ["a", None]]}}
    path.write_text(json.dumps({**content, **merges}))
    with pytest.raises(ValueError, match=r"other\.json has the merge 1"):
        ScratchGPTTokenizer(tokenizer_file=str(path))


def test_deep_nesting_and_surrogates(folder):
    (folder / "vocab.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"vocab\.json is nested too deeply"):
        ScratchGPTTokenizer.from_pretrained(folder)
    (folder / "vocab.json").write_text('{"<\\ud800>": 0}')
    with pytest.raises(ValueError, match=r"vocab\.json: token .* holds a lone surrogate"):
        ScratchGPTTokenizer.from_pretrained(folder)
