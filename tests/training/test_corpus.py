"""Texts become one stream of tokens, once, and the stream becomes blocks."""

import copy
import json
import os
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from filelock import FileLock

from hf_scratch_gpt.training import clear_cache, corpus, texts
from hf_scratch_gpt.training.blocks import Blocks, ShuffledOrder, whole_batches
from hf_scratch_gpt.training.corpus import TokenFile, tokenize

WORDS = ["the", "cat", "Łódź", "日本", "x=1;", "'ll", "<|endoftext|>"]
WORDS += ["\r\n", "\n", "\n\n", "  ", "\t"]


@pytest.fixture
def ids_of(tiny_tokenizer, tmp_path):
    def ids(sources, **options):
        file = tokenize(sources, tiny_tokenizer, cache_dir=tmp_path / "cache", **options)
        return file.ids().tolist()

    return ids


def expected(tokenizer, *documents):
    end = tokenizer.eos_token_id
    return [token for text in documents for token in (*tokenizer(text)["input_ids"], end)]


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(("piece", "spaces"), [(40, " \n"), (333, " \n"), (5, "")])
def test_a_text_read_in_pieces_gives_the_tokens_of_the_whole(
    piece, spaces, tiny_tokenizer, ids_of, tmp_path, monkeypatch
):
    monkeypatch.setattr(texts, "PIECE_BYTES", piece)
    choose = random.Random(piece)
    text = "".join(choose.choice(WORDS) + choose.choice(spaces) for _ in range(400 * len(spaces)))
    text = text or "日本語" * 20  # without a place to cut
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    pieces = list(texts.read(path, "text"))
    assert len(pieces) > 2
    assert "".join(part.text for part in pieces) == text
    assert [part.ends for part in pieces] == [False] * (len(pieces) - 1) + [True]
    assert sum(part.size for part in pieces) == path.stat().st_size
    if spaces:
        assert ids_of(path) == expected(tiny_tokenizer, text)


def test_every_kind_of_source_gives_its_documents_in_order(tiny_tokenizer, ids_of, tmp_path):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden.txt").write_text("no")
    (folder / "skipped.csv").write_text("no")
    (folder / "b.txt").write_bytes("\ufeffsecond".encode())
    (folder / "deep" / "c.MD").write_text("third")
    parquet(folder / "a.parquet", text=["first", None, ""], other=[1, 2, 3])
    lines = [{"text": "fourth\nwith lines"}, {"text": ""}, {"text": "fi\ud83d\ude00th \ud800"}]
    (tmp_path / "d.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    found = ids_of([folder, str(tmp_path / "d.jsonl")])
    wanted = ["first", "second", "third", "fourth\nwith lines", "fi😀th \ufffd"]
    assert found == expected(tiny_tokenizer, *wanted)

    (tmp_path / "e.jsonl").write_text('{"body": "one", "text": 1}\n')
    table = parquet(tmp_path / "e.parquet", body=pa.array(["two"], pa.large_string()))
    found = ids_of([tmp_path / "e.jsonl", table], text_field="body")
    assert found == expected(tiny_tokenizer, "one", "two")


def test_a_data_set_is_loaded_by_its_name(tiny_tokenizer, ids_of, tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", text=["one", None, "two"])
    load, asked = datasets.load_dataset, []

    def loaded(*arguments, **options):
        asked.append((*arguments, options))
        return load("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path))

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets, "load_dataset", loaded)
    assert ids_of("somebody/texts:small") == expected(tiny_tokenizer, "one", "two")
    assert asked == [("somebody/texts", "small", {"split": "train"})]
    with pytest.raises(ValueError, match=r"no column 'body'; it has 'text'"):
        ids_of("somebody/texts:small", text_field="body")


BAD_FILES = {
    "empty.txt": (b"", r"empty\.txt is empty; leave it out"),
    "binary.txt": (b"abc\0def", r"binary\.txt is not UTF-8 text: byte 3 is 0x00; convert"),
    "latin.txt": (b"0123456789\xe4bc", r"latin\.txt is not UTF-8 text: byte 10 is 0xe4"),
    "cut.txt": ("0123456789é".encode()[:-1], r"cut\.txt is not UTF-8 text: byte 10 is 0xc3"),
    "utf16.jsonl": ('{"text": "a"}'.encode("utf-16"), r"utf16\.jsonl is not UTF-8 text: byte 0"),
    "late.jsonl": (b'{"text": "a"}\n{"text": "\xff"}', r"late\.jsonl is not UTF-8 .*byte 24 is"),
    "cut.jsonl": (b'{"text": "a"}\n\n{"text": ', r"cut\.jsonl, line 3 is not JSON \(Expecting val"),
    "list.jsonl": (b'["a"]', r"list\.jsonl, line 1 is not a JSON object: \[\"a\"\]"),
    "field.jsonl": (b'{"a": 1, "b": 2}', r"line 1 has no text in field 'text'; it has 'a', 'b'"),
    "number.jsonl": (b'{"text": 1}', r"line 1 has no text in field 'text'"),
    "deep.jsonl": (b"[" * 100_000, r"deep\.jsonl, line 1 is nested too deeply"),
    "nothing.jsonl": (b'\n{"text": ""}\n', r"nothing\.jsonl is empty"),
    "bad.parquet": (b"PAR1 but no more", r"bad\.parquet is damaged, or is not a Parquet file"),
    "table.csv": (b"a,b", r"table\.csv ends in '\.csv', but a file of texts ends in \.txt or "),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_the_place_in_it(name, ids_of, tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "PIECE_BYTES", 4)
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        ids_of(tmp_path / name)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "cache").glob("*.ids")), "nothing half done is left"


def test_other_bad_sources_are_named(ids_of, tmp_path):
    parquet(tmp_path / "a.parquet", text=[1, 2])
    (tmp_path / "folder").mkdir()
    for source, message in [
        (tmp_path / "a.parquet", r"a\.parquet has no text in column 'text'; it has 'text'"),
        (tmp_path / "folder", r"folder has no file below it that ends in \.txt"),
        (tmp_path / "none.txt", r"none\.txt' does not exist; name a file, a folder or a data set"),
        ("./none", r"'\./none' does not exist"),
        ("", r"'' does not exist"),
        ("nobody/nothing", r"nobody/nothing is not a file or folder, and cannot be loaded as a"),
        ([], r"no source was given"),
    ]:
        with pytest.raises(ValueError, match=message):
            ids_of(source)


@pytest.mark.parametrize(("size", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_ids_take_two_bytes_where_they_fit(size, dtype, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "vocabulary_size", lambda tokenizer: size)
    (tmp_path / "a.txt").write_text("one two")
    file = tokenize(tmp_path / "a.txt", tiny_tokenizer, cache_dir=tmp_path)
    assert (file.dtype, file.tokens) == (dtype, len(file.ids()))
    assert file.ids().dtype == dtype
    assert file.ids().tolist() == expected(tiny_tokenizer, "one two")


class _Counting:
    """A tokenizer that counts the batches it encodes, and may fail at one."""

    def __init__(self, tokenizer, failing=None):
        self.tokenizer, self.failing, self.batches = tokenizer, failing, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, texts, **options):
        self.batches += any(texts)
        if self.batches == self.failing:
            raise KeyboardInterrupt
        return self.tokenizer(texts, **options)


def test_texts_are_encoded_again_only_when_something_changed(tiny_tokenizer, tmp_path):
    tokenizer = _Counting(copy.deepcopy(tiny_tokenizer))
    path = tmp_path / "a.txt"
    path.write_text("one two")

    def encodes(**options):
        before = tokenizer.batches
        file = tokenize(path, tokenizer, cache_dir=tmp_path, **options)
        assert file.ids().tolist() == expected(tokenizer.tokenizer, path.read_text())
        return tokenizer.batches - before

    assert encodes() == 1
    tokenizer("a call that pads and cuts", padding="max_length", truncation=True, max_length=9)
    assert encodes() == 0
    path.write_text("one 222")
    os.utime(path, ns=(0, 0))
    assert encodes() == 1
    tokenizer.tokenizer.add_tokens(["222"])
    assert encodes() == 1
    assert encodes() == 0


def test_what_was_left_half_done_is_not_used(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(corpus, "CHARACTERS", 10)
    (tmp_path / "a.jsonl").write_text("\n".join(['{"text": "one two three"}'] * 5))

    def encode(tokenizer):
        return tokenize(tmp_path / "a.jsonl", tokenizer, cache_dir=tmp_path / "cache")

    with pytest.raises(KeyboardInterrupt):
        encode(_Counting(tiny_tokenizer, failing=3))
    assert not list((tmp_path / "cache").glob("*.unfinished"))
    counting = _Counting(tiny_tokenizer)
    file = encode(counting)
    assert counting.batches == 5
    assert file.ids().tolist() == expected(tiny_tokenizer, *["one two three"] * 5)

    # as kill -9 or a full disk may leave it
    whole = file.path.read_bytes()
    description = file.path.with_suffix(".json")
    described = description.read_bytes()
    for damage in (
        lambda: file.path.write_bytes(whole[:-2]),
        lambda: file.path.write_bytes(b""),
        lambda: file.path.unlink(),
        lambda: description.write_bytes(described[:-5]),
        lambda: description.unlink(),
        lambda: file.path.rename(file.path.with_suffix(".unfinished")),
    ):
        damage()
        assert encode(tiny_tokenizer) == file
        assert file.path.read_bytes() == whole


def test_of_several_that_ask_at_once_one_encodes(tiny_tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("one two " * 1000)
    arguments = (tmp_path / "a.txt", counting := _Counting(tiny_tokenizer))
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(tokenize, *arguments, cache_dir=tmp_path) for _ in range(4)]
    files = [each.result() for each in asked]
    assert counting.batches == 1
    assert files == [files[0]] * 4


def test_what_is_kept_can_be_removed_but_nothing_else(tiny_tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("one two " * 1000)
    cache = tmp_path / "cache"
    file = tokenize(tmp_path / "a.txt", tiny_tokenizer, cache_dir=cache)
    (cache / "mine.json").write_text("precious")
    kept = file.path.stat().st_size + file.path.with_suffix(".json").stat().st_size
    with FileLock(f"{file.path}.lock"):
        assert clear_cache(cache) == 0, "they are being written"
    assert clear_cache(cache) == kept
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == ["mine.json"]
    assert clear_cache(cache) == 0
    assert clear_cache(tmp_path / "none") == 0
    assert tokenize(tmp_path / "a.txt", tiny_tokenizer, cache_dir=cache) == file


def test_a_tokenizer_without_an_end_is_refused(tiny_tokenizer, tmp_path):
    endless = copy.deepcopy(tiny_tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match=r"no end-of-text token .* set its eos_token"):
        tokenize(tmp_path, endless, cache_dir=tmp_path)


@pytest.fixture
def stream(tmp_path):
    """35 tokens, 0 to 34."""
    np.arange(35, dtype=np.uint16).tofile(tmp_path / "a.ids")
    return TokenFile(tmp_path / "a.ids", "uint16", 35, "0")


def test_blocks_are_the_stream_cut_in_equal_parts(stream):
    blocks = Blocks(stream, 8)
    assert len(blocks) == 4
    for number, block in enumerate(blocks):
        wanted = torch.arange(8 * number, 8 * number + 8)
        assert torch.equal(block["input_ids"], wanted)
        assert torch.equal(block["labels"], wanted)
    with pytest.raises(IndexError):
        blocks[4]
    assert len(pickle.dumps(blocks)) < 1000
    assert torch.equal(pickle.loads(pickle.dumps(blocks))[3]["labels"], torch.arange(24, 32))


def test_the_last_part_of_the_blocks_is_held_out(stream):
    for fraction, held_out in [(0.01, 1), (0.3, 1), (0.5, 2)]:
        parts = Blocks(stream, 8).split(fraction)
        firsts = [[block["input_ids"][0].item() // 8 for block in part] for part in parts]
        assert firsts == [[0, 1, 2, 3][:-held_out], [0, 1, 2, 3][-held_out:]]


def test_blocks_are_shuffled_as_accelerate_does():
    theirs, ours = SeedableRandomSampler(range(10_000), data_seed=7), ShuffledOrder(10_000, 7)
    for _ in range(2):
        assert list(ours) == list(theirs)
    for order in (theirs, ours):
        order.set_epoch(5)
    assert list(ours) == list(theirs)


@pytest.mark.parametrize(("batch_size", "numbers"), [(2, [0, 1, 2, 3]), (3, [0, 1, 2, 3, 0, 1])])
def test_the_first_blocks_fill_the_last_batch(batch_size, numbers, stream):
    blocks = whole_batches(Blocks(stream, 8), batch_size)
    assert [block["input_ids"][0].item() // 8 for block in blocks] == numbers
    assert len(blocks) == len(numbers)
    assert len(whole_batches(Blocks(stream, 8), 9)) == 9
