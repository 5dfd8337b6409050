"""Damaged and contradictory vocabularies are refused with the file and the line or token."""

import base64
import json
import shutil

import pytest

from hf_scratch_gpt import ScratchGPTTokenizer
from hf_scratch_gpt.model.vocabulary_scratch_gpt import BYTE_TO_UNICODE


@pytest.fixture
def folder(openai_tiny, tmp_path):
    """A vocabulary to spoil, as transformers names the files."""
    shutil.copy(openai_tiny / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(openai_tiny / "vocab.bpe", tmp_path / "merges.txt")
    return tmp_path


def edit_vocab(**changes):
    def spoil(folder):
        vocab = json.loads((folder / "vocab.json").read_text()) | changes
        vocab = {token: number for token, number in vocab.items() if number is not None}
        (folder / "vocab.json").write_text(json.dumps(vocab))

    return spoil


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def edit_line(number, line):
    def spoil(folder):
        lines = (folder / "merges.txt").read_text().split("\n")
        lines[number - 1] = line
        (folder / "merges.txt").write_text("\n".join(lines))

    return spoil


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


SPOILT = {
    "deep": (write("vocab.json", b"[" * 200_000), r"vocab\.json is nested too deeply"),
    "surrogate": (write("vocab.json", b'{"<\\ud800>": 0}'), r"json: token .* holds a lone surr"),
    "no vocabulary": (lambda f: (f / "vocab.json").unlink(), r"takes vocab.json and merges.txt"),
    "no merges": (lambda f: (f / "merges.txt").unlink(), r"takes vocab.json and merges.txt"),
    "cut vocabulary": (cut("vocab.json", 1000), r"vocab\.json is not complete JSON at line 1, col"),
    "cut merges": (cut("merges.txt", 400), r"merges\.txt, line \d+ (merges|is not)|no merge that"),
    "no line": (edit_line(100, ""), r"merges\.txt"),
    "empty merges": (write("merges.txt", b""), r"merges\.txt has no merge that makes token"),
    "not UTF-8": (write("merges.txt", b"#version\n\xff\xfe a\n"), r"txt is not UTF-8 at byte 9"),
    "vocabulary not UTF-8": (write("vocab.json", b'{"\xff": 1}'), r"vocab\.json is not UTF-8"),
    "a list": (write("vocab.json", b"[1, 2]"), r"vocab\.json is not a JSON object"),
    "token twice": (write("vocab.json", b'{"a": 0, "a": 1}'), r"vocab\.json has 'a' twice"),
    "gap": (edit_vocab(**{"<|endoftext|>": 500}), r"vocab\.json has no token with id 399"),
    "id twice": (edit_vocab(**{"<|endoftext|>": 5}), r"'&' and '<\|endoftext\|>' share id 5"),
    "no number": (edit_vocab(**{"<|endoftext|>": "x"}), r"'<\|endoftext\|>' has 'x' for an id"),
    "no byte": (edit_vocab(**{"!": None, "<x>": 0}), r"byte 0x21 has no token"),
    "unknown token": (edit_line(3, "zq zq"), r"line 3 merges 'zq' and 'zq', but 'zqzq' is"),
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
    made = {line.replace(" ", "") for line in lines[2:]}
    number = next(n for n, line in enumerate(lines) if n > 2 and made & {*line.split(" ")})
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
    ("change", "message"),
    [
        ({"model": {"type": "BPE", "vocab": None, "merges": []}}, ""),
        ({"model": {"type": "BPE", "vocab": ["a"], "merges": []}}, ""),
        ({"model": {"merges": [1, ["a", None]]}}, " has the merge 1"),
        ({"added_tokens": [None]}, ""),
        ({"added_tokens": ["x"]}, ""),
        ({"added_tokens": [{"content": "x", "special": 3}]}, " cannot be read"),
        ({"pre_tokenizer": "ByteLevel"}, " cannot be read"),
        ({"model": {"type": "WordLevel"}}, " .* load it with transformers' PreTrainedTokenizerF"),
    ],
    ids=str,
)
def test_malformed_tokenizer_json(change, message, tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    if "model" in change:
        change = {"model": content["model"] | change["model"]}
    (tmp_path / "other.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=rf"other\.json{message}"):
        ScratchGPTTokenizer(tokenizer_file=str(tmp_path / "other.json"))
