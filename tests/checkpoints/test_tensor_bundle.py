"""The reader of TensorFlow checkpoints, on the index of OpenAI's real release."""

import os
from math import prod
from pathlib import Path

import pytest

from hf_scratch_gpt.checkpoints.tensor_bundle import read_bundle

from ..commands import convert as main
from .releases import change_release, field, table

RELEASE = os.environ.get("GPT2_RELEASE_DIR")


@pytest.mark.skipif(not RELEASE, reason="GPT2_RELEASE_DIR does not name OpenAI's 117M release")
def test_index_of_the_real_release():
    shapes = {stored.name: stored.shape for stored in read_bundle(Path(RELEASE) / "model.ckpt")}
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


def test_a_release_in_several_shards(openai_tiny, converted_tiny, tmp_path, capsys):
    release = tmp_path / "release"
    change_release(openai_tiny, release, num_shards=3)
    assert len(list(release.glob("*.data-*"))) == 3
    assert main([str(release), str(tmp_path / "whole")]) == 0
    weights = [folder / "model.safetensors" for folder in (tmp_path / "whole", converted_tiny)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    (release / "model.ckpt.data-00001-of-00003").unlink()
    assert main([str(release), str(tmp_path / "out")]) == 2
    message = "data-00001-of-00003: model/h0/ln_1/b lies in a file that is missing"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
