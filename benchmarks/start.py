"""What comes before the first token: loading and tokenization."""

import os
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from transformers import GPT2LMHeadModel, GPT2TokenizerFast

from hf_scratch_gpt import ScratchGPTForCausalLM, ScratchGPTTokenizer
from hf_scratch_gpt.checkpoints.bundled import BUNDLED

from .peers import in_our_format
from .timing import in_turns, rates


def loading(folder: Path, rounds: int) -> dict[str, Any]:
    """Loads a second by `from_pretrained`, of a checkpoint of GPT-2's and of one of ours."""
    ways = {
        "GPT2LMHeadModel": partial(GPT2LMHeadModel.from_pretrained, folder),
        "ours": partial(ScratchGPTForCausalLM.from_pretrained, in_our_format(folder)),
        "ours, from GPT-2's": partial(ScratchGPTForCausalLM.from_pretrained, folder),
    }
    for way in ways.values():
        way()
    # A load takes a twentieth of a second, so chance needs more of them.
    return {"unit": "loads/s", "rates": rates(1, in_turns(ways, 10 * rounds))}


def tokenization(texts: int, rounds: int) -> dict[str, Any]:
    """MB a second of Python's manual again and again, 2 MB of it, in equal `texts`.

    The vocabulary is that of `GPT2_RELEASE_DIR`, or has 400 tokens. Ids are compared first.
    """
    folder = Path(os.environ.get("GPT2_RELEASE_DIR", BUNDLED))
    vocab, merges = str(folder / "encoder.json"), str(folder / "vocab.bpe")
    ours = ScratchGPTTokenizer(vocab, merges)
    fast = GPT2TokenizerFast(vocab=vocab, merges=merges)
    manual, size = "\n".join(topics.values()) * 6, 2_000_000 // texts
    batch = [manual[start : start + size] for start in range(0, texts * size, size)]
    ways = {
        "ours": lambda: ours(batch, verbose=False)["input_ids"],
        "GPT2TokenizerFast": lambda: fast(batch, verbose=False)["input_ids"],
        "tiktoken": lambda: [ours.tiktoken.encode_ordinary(text) for text in batch],
    }
    ids = [way() for way in ways.values()]
    assert ids[0] == ids[1] == ids[2], "ids differ"
    return {"unit": "MB/s", "rates": rates(texts * size / 1e6, in_turns(ways, rounds))}
