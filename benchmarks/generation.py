"""Writing and reading: one text, a long prompt, 32 texts at once."""

from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_scratch_gpt import ScratchGPTConfig, ScratchGPTForCausalLM

from .peers import DTYPES, OURS, load, optimize_for_generation, writers
from .timing import in_turns, matrix_peak, rates, read_bandwidth, seconds_of

PROMPT, WRITTEN = 32, 64
LONG, TEXTS, WRITTEN_BY_EACH = 1024, 32, 8
# How far below the best token's score a written one's may be on average, in spreads of the scores.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.02, "int8": 0.02}


def weight_bytes(folder: Path, weights: str) -> int:
    """Bytes of all matrices, which one token reads; greedy search of ours reads less."""
    with torch.device("meta"):
        model = ScratchGPTForCausalLM(ScratchGPTConfig.from_preset(folder.name))
    size = {"float32": 4, "bfloat16": 2, "int8": 1}[weights]
    linears = (module for module in model.modules() if isinstance(module, torch.nn.Linear))
    return size * sum(linear.weight.numel() for linear in linears)


@torch.no_grad()
def check(
    name: str,
    ids: torch.Tensor,
    written: list[list[int]],
    reference: PreTrainedModel,
    tolerance: float,
) -> None:
    """Assert that `reference`, in float32, would have written the same, up to rounding.

    Two ways to round may take one token or another where these are as good, and the texts part.
    So each token is looked at by itself, after those that were written before it.
    """
    text = torch.tensor(written)
    whole = torch.cat([ids, text], dim=1).to(reference.device)
    logits = reference(whole).logits[:, ids.shape[1] - 1 : -1]
    chosen = logits.gather(-1, text.to(reference.device)[..., None])[..., 0]
    gap = float(((logits.amax(-1) - chosen) / logits.std(-1)).mean())
    assert gap < tolerance, f"{name} writes other tokens than GPT2LMHeadModel: {gap}"


def decode(folder: Path, weights: str, rounds: int, device: str) -> dict[str, Any]:
    """Tokens a second of one text."""
    ids = torch.randint(0, 50257, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    reference = load(folder, "float32", device)[0]
    ways, firsts, texts, crashed = {}, {}, {}, []
    for name, write in writers(folder, weights, device):
        try:
            firsts[name] = seconds_of(lambda write=write: write(ids, 2), device)
        except BrokenProcessPool:
            crashed.append(name)
            continue
        texts[name] = write(ids, WRITTEN)
        check(name, ids, texts[name], reference, TOLERANCE[weights])
        ways[name] = lambda write=write: write(ids, WRITTEN)
    if weights == "float32":
        expected = texts["GPT2LMHeadModel"]
        for name, text in texts.items():
            assert text == expected, f"{name} writes other tokens than GPT2LMHeadModel"
    size = weight_bytes(folder, weights)
    return {
        "unit": "tokens/s",
        "rates": rates(WRITTEN, in_turns(ways, rounds, device)),
        "limit": read_bandwidth(device) / size,
        "first call, s": firsts,
        "crashed": crashed,
    }


@torch.no_grad()
def prefill(folder: Path, dtype: str, rounds: int, device: str) -> dict[str, Any]:
    """Tokens a second of a prompt of 1,024."""
    ids = torch.randint(0, 50257, (1, LONG), generator=torch.Generator().manual_seed(0)).to(device)
    theirs, ours = load(folder, dtype, device)
    models = {"GPT2LMHeadModel": theirs, OURS[0]: ours}
    models[OURS[1]] = optimize_for_generation(load(folder, dtype, device)[1])
    ways = {
        name: lambda model=model: model(ids, use_cache=True, logits_to_keep=1)
        for name, model in models.items()
    }
    logits = {name: way().logits[0, -1].float() for name, way in ways.items()}
    spread = logits["GPT2LMHeadModel"].std()
    for name, values in logits.items():
        difference = (values - logits["GPT2LMHeadModel"]).abs().max() / spread
        assert difference < (1e-3 if dtype == "float32" else 0.2), f"{name}: {difference}"
    linears = 12 * ours.config.hidden_size**2 * ours.config.num_hidden_layers
    attention = ours.config.num_hidden_layers * LONG * ours.config.hidden_size * 2
    return {
        "unit": "tokens/s",
        "rates": rates(LONG, in_turns(ways, rounds, device)),
        "limit": matrix_peak(DTYPES[dtype], device) / (2 * linears + attention),
    }


def batch(folder: Path, dtype: str, rounds: int, device: str) -> dict[str, Any]:
    """Tokens a second of 32 texts at once."""
    ids = torch.randint(0, 50257, (TEXTS, PROMPT), generator=torch.Generator().manual_seed(0))
    reference = load(folder, "float32", device)[0]
    ways = {}
    for name, write in writers(folder, dtype, device):
        if name != "GPT2LMHeadModel, compiled" and not name.startswith("llama.cpp"):
            check(name, ids, write(ids, WRITTEN_BY_EACH), reference, TOLERANCE[dtype])
            ways[name] = lambda write=write: write(ids, WRITTEN_BY_EACH)
    seconds = in_turns(ways, rounds, device)
    return {"unit": "tokens/s", "rates": rates(TEXTS * WRITTEN_BY_EACH, seconds)}
