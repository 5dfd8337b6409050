"""The reader of TensorFlow checkpoints, on the index of OpenAI's real release."""

import os
from math import prod
from pathlib import Path

import pytest

from hf_scratch_gpt.checkpoints.commands import convert_command as main
from hf_scratch_gpt.checkpoints.tensor_bundle import read_bundle

from .releases import field, table, write_release


@pytest.fixture
def release() -> Path:
    folder = os.environ.get("GPT2_RELEASE_DIR")
    if not folder:
        pytest.skip("GPT2_RELEASE_DIR does not name the folder of OpenAI's 117M release")
    return Path(folder)


def test_index_of_the_real_release(release):
    shapes = {stored.name: stored.shape for stored in read_bundle(release / "model.ckpt")}
    assert len(shapes) == 148
    assert shapes["model/wte"] == (50257, 768)
    assert shapes["model/h11/attn/c_attn/w"] == (1, 768, 2304)
    assert sum(map(prod, shapes.values())) == 124_439_808


@pytest.mark.parametrize("content", [b"", b"hello", b"x" * 100], ids=["empty", "short", "text"])
def test_a_file_that_is_no_index(content, tmp_path):
    (tmp_path / "model.ckpt.index").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.ckpt.index does not end like"):
        read_bundle(tmp_path / "model.ckpt")


@pytest.mark.parametrize("number", [700_000_000, 2**62])
def test_a_number_in_place_of_a_dimension(number, tmp_path):
    entry = field(1, 1) + field(2, field(2, number))
    (tmp_path / "model.ckpt.index").write_bytes(table([(b"", field(1, 1)), (b"a", entry)]))
    with pytest.raises(ValueError, match=r"model.ckpt.index is damaged: it does not follow"):
        read_bundle(tmp_path / "model.ckpt")


def test_an_index_far_too_large_is_not_read(openai_tiny, tmp_path):
    data = (openai_tiny / "model.ckpt.index").read_bytes()
    with (tmp_path / "model.ckpt.index").open("wb") as file:
        file.seek(1 << 40)  # a file with a hole
        file.write(data)
    with pytest.raises(ValueError, match=r"model.ckpt.index has \d+ bytes; the index of a GPT-2"):
        read_bundle(tmp_path / "model.ckpt")


def test_a_release_in_several_shards(openai_tiny, tmp_path, capsys):
    sizes = dict(n_vocab=400, n_ctx=32, n_embd=48, n_head=4, n_layer=2)
    weights = []
    for num_shards in (1, 3):
        release, out = tmp_path / f"release{num_shards}", tmp_path / f"out{num_shards}"
        write_release(release, openai_tiny, sizes, num_shards=num_shards)
        assert len(list(release.glob("*.data-*"))) == num_shards
        assert main([str(release), str(out)]) == 0
        weights.append((out / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    (tmp_path / "release3" / "model.ckpt.data-00001-of-00003").unlink()
    assert main([str(tmp_path / "release3"), str(tmp_path / "out")]) == 1
    assert (
        "data-00001-of-00003: model/h0/ln_1/b lies in a file that is missing"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
