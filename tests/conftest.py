"""What every test shares: no network, no warning that nobody expects, tiny models."""

import inspect
import logging
import os
import tempfile

# Models here are tiny: threads would only wait for one another. Subprocesses inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
# Before transformers reads them: code copied from saved models goes to a folder of this run.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_scratch_gpt-tests-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from hf_scratch_gpt import ScratchGPTForCausalLM, ScratchGPTTokenizer
from hf_scratch_gpt.checkpoints.bundled import BUNDLED

from .commands import convert
from .models import random_gpt2, random_model

transformers_logging.disable_progress_bar()
FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def logged_warnings(request):
    """What is logged as a warning or worse; it stays empty unless a test asks for this list."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("transformers", "hf_scratch_gpt")]
    for logger in loggers:
        logger.addHandler(handler)
    yield records
    for logger in loggers:
        logger.removeHandler(handler)
    expected = "logged_warnings" in inspect.signature(request.function).parameters
    assert expected or not records, records


@pytest.fixture(scope="session")
def openai_tiny() -> Path:
    """A release in OpenAI's layout, with the logits that OpenAI's code computes on it."""
    return BUNDLED


@pytest.fixture(scope="session")
def converted_tiny(tmp_path_factory, openai_tiny) -> Path:
    """`openai_tiny`, converted."""
    folder = tmp_path_factory.mktemp("converted") / "tiny"
    assert convert([str(openai_tiny), str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(openai_tiny) -> ScratchGPTTokenizer:
    """Of `openai_tiny`; nobody may change it."""
    return ScratchGPTTokenizer.from_pretrained(openai_tiny)


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory) -> Path:
    """A tiny random GPT-2, saved by transformers; eleven layers, as h.10 sorts before h.2."""
    folder = tmp_path_factory.mktemp("gpt2")
    random_gpt2(n_layer=11).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_gpt2(tmp_path_factory) -> Path:
    """A random GPT-2 of two layers, saved by transformers."""
    folder = tmp_path_factory.mktemp("small_gpt2")
    random_gpt2(n_layer=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory) -> Path:
    """A tiny random model of ours, saved."""
    folder = tmp_path_factory.mktemp("saved")
    random_model(ScratchGPTForCausalLM).save_pretrained(folder)
    return folder
