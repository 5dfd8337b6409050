"""Fixtures of the contract tests, and what keeps a project's own settings from breaking them."""

import os
from collections.abc import Iterator

# Nothing here needs the hub; a few libraries would ask it for what a tiny model lacks.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from .subject import Subject

HERE = Path(__file__).parent
SUBJECT = pytest.StashKey[Subject]()


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker, for projects that refuse unknown ones."""
    config.addinivalue_line("markers", "contract_slow: takes seconds, compiling or in processes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Find the model class, or say how to name it; let the slow tests run last.

    A warning is no failure here, whatever the project makes of warnings.
    """
    name = config.getoption("--model-class")
    if not name:
        raise pytest.UsageError(
            "the contract tests need a model: give --model-class package.module:Class, such as "
            "--model-class transformers:LlamaForCausalLM"
        )
    try:
        config.stash[SUBJECT] = Subject.of(name, config.getoption("--model-config"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))
    items.sort(key=lambda item: item.get_closest_marker("contract_slow") is not None)


@pytest.fixture(scope="session")
def subject(pytestconfig: pytest.Config) -> Subject:
    """The model class under test."""
    return pytestconfig.stash[SUBJECT]


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Seeds, and one thread: for models this small, more would wait for one another."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)
