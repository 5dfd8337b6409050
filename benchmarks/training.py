"""A training step: tokens a second, peak memory, and whether the losses are the same."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from hf_scratch_gpt import ScratchGPTConfig
from hf_scratch_gpt.engine.half import is_slow

from .peers import DTYPES, in_our_format
from .timing import matrix_peak, rates

BATCH, LENGTH, STEPS = 2, 1024, 4
SHORT, SHORT_STEPS = 64, 50
# In a process of its own, since peak memory is a process's.
STEP = """
import json, re, sys
import torch
from benchmarks.timing import seconds_of
from transformers import GPT2LMHeadModel
from hf_scratch_gpt import ScratchGPTForCausalLM
from hf_scratch_gpt.engine.swap import optimize_for_training

name, folder, dtype, device, batch, *lengths = sys.argv[1:]
batch, lengths = int(batch), map(int, lengths)
none = dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
if name == "GPT2LMHeadModel":
    model = GPT2LMHeadModel.from_pretrained(folder, use_cache=False, **none)
else:
    model = ScratchGPTForCausalLM.from_pretrained(
        folder, chunked_loss="loss in pieces" in name, use_cache=False, drop_rate=0.0
    )
model.train().to(device)
if "fast" in name:
    optimize_for_training(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
generator = torch.Generator().manual_seed(0)
# Frequent and rare tokens as in texts (Zipf), so that there is something to learn.
frequency = 1 / torch.arange(1, 50258)
losses, times = [], []

def step(length):
    ids = frequency.multinomial(batch * length, replacement=True, generator=generator)
    ids = ids.view(batch, length).to(device)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

for length in lengths:
    times.append(seconds_of(lambda: step(length), device))
# Not ru_maxrss, which begins at the parent's.
status = open("/proc/self/status").read()
peak = int(re.search(r"VmHWM:\\s*(\\d+)", status)[1]) * 1024
if device != "cpu":
    peak = torch.accelerator.max_memory_allocated()
print(json.dumps({"seconds": times[1:], "losses": losses, "peak": peak}))
"""
PEER = "GPT2LMHeadModel"
NAMES = (PEER, "ours, plain", "ours, fast", "ours, fast, loss in pieces")


def has_slow_peer(dtype: str, device: str) -> bool:
    """Whether the CPU has no instructions for `dtype`: the peer is then a hundred times slower."""
    return device == "cpu" and is_slow(DTYPES[dtype])


def run(name: str, folder: Path, dtype: str, lengths: list[int], device: str) -> dict:
    """Seconds a step, losses and peak memory of one model; `lengths` are those of a step's texts.

    The first step is not timed.
    """
    # Weights that are split as they are read stay in memory twice, as pages of the file.
    folder = folder if name == PEER else in_our_format(folder)
    sizes = [str(number) for number in (BATCH, *lengths)]
    done = subprocess.run(
        [sys.executable, "-c", STEP, name, folder, dtype, device, *sizes],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def flops(folder: Path, length: int) -> int:
    """Of a token in a training step: 6 for each weight of a matrix, and attention's.

    A token reads half of the others on average; scores and sums are two products, each forward
    and twice backward. (Kaplan et al. 2020, section 2.1, with the head.)
    """
    config = ScratchGPTConfig.from_pretrained(folder)
    layers, hidden = config.num_hidden_layers, config.hidden_size
    weights = 12 * layers * hidden**2 + config.vocab_size * hidden
    return 6 * weights + 6 * layers * length * hidden


def training(folder: Path, dtype: str, rounds: int, device: str) -> dict[str, Any]:
    """AdamW, under autocast where `dtype` is bfloat16; then short steps for the losses.

    These are compared with the peer's in float32, and with its own in `dtype`. A slow peer is timed
    with shorter texts; its losses and its memory, which would take an hour, are left out.
    """
    is_slow_here = has_slow_peer(dtype, device)
    length, rounds = (SHORT, 1) if is_slow_here else (LENGTH, min(rounds, 3))
    results: dict[str, list[dict]] = {name: [] for name in NAMES}
    for _ in range(rounds):
        for name in NAMES:
            results[name].append(run(name, folder, dtype, [length] * STEPS, device))
    compared = NAMES[1:] if is_slow_here else NAMES
    peaks = {name: max(result["peak"] for result in results[name]) for name in compared}
    if is_slow_here:
        steps = [SHORT, LENGTH]  # from the second on, AdamW keeps its averages
        peaks = {name: run(name, folder, dtype, steps, device)["peak"] for name in compared}
    curves = {name: losses(name, folder, dtype, device) for name in compared}
    exact = curves[PEER] if dtype == "float32" else losses(PEER, folder, "float32", device)
    seconds = {
        name: [second for result in runs for second in result["seconds"]]
        for name, runs in results.items()
    }
    return {
        "unit": "tokens/s",
        "rates": rates(BATCH * length, seconds),
        "limit": matrix_peak(DTYPES[dtype], device) / flops(folder, length),
        "tokens": {"texts": BATCH, "of each": length, "for memory": LENGTH, "for losses": SHORT},
        "peak, GB": {name: peak / 1e9 for name, peak in peaks.items()},
        f"largest relative difference of {SHORT_STEPS} losses to {PEER}'s in float32": {
            name: difference(curve, exact) for name, curve in curves.items()
        },
        f"the same to its own in {dtype}": {
            name: difference(curve, curves[PEER])
            for name, curve in curves.items()
            if PEER in curves and dtype != "float32"
        },
    }


def losses(name: str, folder: Path, dtype: str, device: str) -> list[float]:
    """Those of short steps of one model."""
    return run(name, folder, dtype, [SHORT] * SHORT_STEPS, device)["losses"]


def difference(curve: list[float], exact: list[float]) -> float:
    """The largest of the steps, relative to `exact`."""
    return max(abs(a - b) / b for a, b in zip(curve, exact, strict=True))
