"""Writing and reading: one text, a long prompt, 32 texts at once."""

import math
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedModel

from hf_scratch_gpt import ScratchGPTConfig, ScratchGPTForCausalLM

from .peers import DTYPES, OURS, load, optimize_for_generation, writers
from .timing import in_turns, matrix_peak, rates, read_bandwidth, seconds_of

PROMPT, WRITTEN = 32, 64
LONG, TEXTS, WRITTEN_BY_EACH = 1024, 32, 8
# How far below the best token's score a written one's may be on average, in spreads of the scores.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.02, "int8": 0.02}


def weight_bytes(folder: Path, weights: str) -> int:
    """Bytes of all matrices, which one token reads; the positions and biases are left out.

    Ours reads less of them where only the best token is asked for, unless all are in int8, so it
    may be ahead of the limit.
    """
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


class Forced(LogitsProcessor):
    """Has `generate` write `text` (T,), and keeps the logarithm of each token's probability."""

    def __init__(self, text: torch.Tensor) -> None:
        self.text = text
        self.found: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self.text[input_ids.shape[1]]
        self.found.append(float(scores.log_softmax(-1)[0, token]))
        return torch.full_like(scores, -torch.inf).index_fill(1, token, 0)


@torch.no_grad()
def perplexity(folder: Path, device: str) -> dict[str, Any]:
    """Of a text that the model has written by chance, for each form of its weights."""
    _, ours = load(folder, "float32", device)
    torch.manual_seed(0)
    start = torch.tensor([[1]], device=device)
    text = ours.generate(start, max_new_tokens=500, do_sample=True, top_k=0, pad_token_id=0)
    exact = math.exp(ours(text, labels=text).loss)
    values = {"float32": exact}
    half = load(folder, "bfloat16", device)[1]
    values["bfloat16"] = math.exp(half(text, labels=text).loss)
    # By what writes tokens one at a time, which is not what reads a prompt.
    small = optimize_for_generation(ours, weights="int8")
    forced = Forced(text[0])
    small.generate(
        text[:, :1],
        attention_mask=torch.ones(1, 1),
        max_new_tokens=text.shape[1] - 1,
        do_sample=False,
        logits_processor=[forced],
        pad_token_id=0,
    )
    values["int8"] = math.exp(-sum(forced.found) / len(forced.found))
    return {"perplexity": values, "ratio": {name: value / exact for name, value in values.items()}}
