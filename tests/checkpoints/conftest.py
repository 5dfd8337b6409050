"""What the tests of checkpoints share: a smaller GPT-2, and a model that was converted once."""

from pathlib import Path

import pytest

from hf_scratch_gpt.checkpoints.commands import convert_command

from ..models import random_gpt2


@pytest.fixture(scope="session")
def small_gpt2(tmp_path_factory) -> Path:
    """A random GPT-2 of two layers, saved by transformers."""
    folder = tmp_path_factory.mktemp("small_gpt2")
    random_gpt2(n_layer=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def converted_gpt2(tmp_path_factory, small_gpt2) -> Path:
    """`small_gpt2`, converted."""
    folder = tmp_path_factory.mktemp("converted") / "out"
    assert convert_command([str(small_gpt2), str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def converted_tiny(tmp_path_factory, openai_tiny) -> Path:
    """`openai_tiny`, converted."""
    folder = tmp_path_factory.mktemp("converted") / "out"
    assert convert_command([str(openai_tiny), str(folder)]) == 0
    return folder
