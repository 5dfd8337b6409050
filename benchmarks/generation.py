"""Writing and reading: one text, a long prompt, several texts at once."""

from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_scratch_gpt import ScratchGPTConfig, ScratchGPTForCausalLM

from .peers import DTYPES, Write, load, writers
from .timing import in_turns, matrix_peak, rates, read_bandwidth, seconds_of

# How far below the best token's score a written one's may be on average, in spreads of the scores.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.02, "int8": 0.02}
_CHECKED = 4  # texts; all would take longer than to write them
_TOO_SLOW = 10  # times the median of all; such a way is left out


def limit(folder: Path, weights: str, device: str, texts: int, prompt: int, written: int) -> float:
    """The least seconds: matrices read at memory's speed, or multiplied at the processor's.

    Greedy search of ours reads less than all of the head.
    """
    with torch.device("meta"):
        model = ScratchGPTForCausalLM(ScratchGPTConfig.from_preset(folder.name))
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    numbers = sum(linear.weight.numel() for linear in linears)
    size = {"float32": 4, "bfloat16": 2, "int8": 1}[weights]
    peak = matrix_peak(DTYPES.get(weights, torch.float32), device)
    read, flops = size * numbers / read_bandwidth(device), 2 * numbers * texts
    of_prompt = 2 * (numbers - model.lm_head.weight.numel()) * texts * prompt / peak
    return of_prompt + (written - 1) * max(read, flops / peak)


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


def tried(
    ways: list[tuple[str, Write]], ids: torch.Tensor, device: str
) -> tuple[dict[str, Write], dict[str, float], list[str]]:
    """Those of `ways` that are worth their time, seconds of their first calls, and what is not.

    Each writes two tokens after a part of one text, twice: the first call prepares.
    """
    firsts: dict[str, float] = {}
    seconds: dict[str, float] = {}
    left_out = []
    for name, write in ways:
        trial = partial(write, ids[:1, :32], 2)
        try:
            firsts[name] = seconds_of(trial, device)
            seconds[name] = seconds_of(trial, device)
            print(
                f"  {name}: first call {firsts[name]:.2f} s, then {seconds[name]:.2f}", flush=True
            )
        except (BrokenProcessPool, RuntimeError) as error:
            left_out.append(f"{name} ({error})")
    most = _TOO_SLOW * median(seconds.values())
    left_out += [
        f"{name} ({taken / most * _TOO_SLOW:.0f} times the median)"
        for name, taken in seconds.items()
        if taken > most
    ]
    kept = {name: write for name, write in ways if seconds.get(name, most + 1) <= most}
    return kept, firsts, left_out


def writing(
    folder: Path,
    weights: str,
    rounds: int,
    device: str,
    openvino: str | None,
    texts: int = 1,
    prompt: int = 32,
    written: int = 64,
) -> dict[str, Any]:
    """Tokens a second: those written, or, if only one is written, those of the prompt."""
    ids = torch.randint(0, 50257, (texts, prompt), generator=torch.Generator().manual_seed(0))
    reference = load(folder, "float32", device)[0]
    found, missing = writers(folder, weights, device, openvino, texts, prompt)
    ways, firsts, left_out = tried(found, ids, device)
    for name, write in ways.items():
        text = write(ids, written)
        check(name, ids[:_CHECKED], text[:_CHECKED], reference, TOLERANCE[weights])
    calls = {name: partial(write, ids, written) for name, write in ways.items()}
    amount = texts * (prompt if written == 1 else written)
    return {
        "unit": "tokens/s",
        "rates": rates(amount, in_turns(calls, rounds, device)),
        "limit": amount / limit(folder, weights, device, texts, prompt, written),
        "first call, s": firsts,
        "left out": missing + left_out,
    }
