"""What the demo trains on, and what it is compared with."""

import numpy as np
import pytest

from hf_scratch_gpt.training.bigram import bigram_loss
from hf_scratch_gpt.training.blocks import Blocks
from hf_scratch_gpt.training.corpus import TokenFile
from hf_scratch_gpt.training.manual import read_texts, write_texts


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("manual"), 0.02)


def test_the_texts_are_pythons_and_no_text_is_in_both_files(files):
    training, validation = map(read_texts, files)
    assert sum(map(len, training)) > 1_500_000
    assert 0.02 < sum(map(len, validation)) / sum(map(len, training + validation)) < 0.06
    assert any('The "for" statement is used to' in text for text in training + validation)
    parts = [part for text in training + validation for part in text.split("\n\n")]
    assert len(parts) == len(set(parts))


def test_texts_that_are_there_stay(files):
    before = [file.read_bytes() for file in files]
    assert write_texts(files[0].parent, 0.5) == files
    assert [file.read_bytes() for file in files] == before


def test_bigram_loss_is_that_of_its_formula(tmp_path):
    def blocks(*rows):
        path = tmp_path / f"{len(rows)}.ids"
        np.array(rows, "uint16").tofile(path)
        return Blocks(TokenFile(path, "uint16", 4 * len(rows), ""), 4)

    frequency = [(4 + 1) / 11, (3 + 1) / 11, (1 + 1) / 11]  # of 8 tokens, one more each
    pairs = [(3, 4, 1), (1, 1, 0), (1, 4, 2)]  # how often b follows a, how often any does, b
    losses = []
    for m in (1, 2, 5, 10, 20, 50, 100, 200):
        p = [(count + m * frequency[b]) / (followed + m) for count, followed, b in pairs]
        losses.append(-sum(np.log(p)) / 3)
    training, validation = blocks([0, 1, 0, 1], [0, 2, 0, 1]), blocks([0, 1, 0, 2])
    assert bigram_loss(training, validation, 3) == pytest.approx(min(losses), abs=1e-12)
