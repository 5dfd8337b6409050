"""What the tests of checkpoints share: a smaller GPT-2, and a model that was converted once."""

from pathlib import Path

import pytest

from ..commands import convert


@pytest.fixture(scope="session")
def converted_gpt2(tmp_path_factory, small_gpt2) -> Path:
    """`small_gpt2`, converted."""
    folder = tmp_path_factory.mktemp("converted") / "out"
    assert convert([str(small_gpt2), str(folder)]) == 0
    return folder
