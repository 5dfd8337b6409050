"""A training step: tokens a second, peak memory, and whether the losses are the same."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from .peers import in_our_format
from .timing import rates

BATCH, LENGTH, STEPS = 2, 1024, 4
# In a process of its own, since peak memory is a process's.
STEP = """
import json, re, sys
import torch
from benchmarks.timing import seconds_of
from transformers import GPT2LMHeadModel
from hf_scratch_gpt import ScratchGPTForCausalLM

name, folder, *sizes, device = sys.argv[1:]
batch, length, steps = map(int, sizes)
none = dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
if name == "GPT2LMHeadModel":
    model = GPT2LMHeadModel.from_pretrained(folder, use_cache=False, **none)
else:
    model = ScratchGPTForCausalLM.from_pretrained(
        folder, chunked_loss=name.endswith("chunked loss"), use_cache=False, drop_rate=0.0
    )
model.train().to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
generator = torch.Generator().manual_seed(0)
# Frequent and rare tokens as in texts (Zipf), so that there is something to learn.
frequency = 1 / torch.arange(1, 50258)
losses, times = [], []

def step():
    ids = frequency.multinomial(batch * length, replacement=True, generator=generator)
    ids = ids.view(batch, length).to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

for _ in range(steps):
    times.append(seconds_of(step, device))
# Not ru_maxrss, which begins at the parent's.
status = open("/proc/self/status").read()
peak = int(re.search(r"VmHWM:\\s*(\\d+)", status)[1]) * 1024
if device != "cpu":
    peak = torch.accelerator.max_memory_allocated()
print(json.dumps({"seconds": times[1:], "losses": losses, "peak": peak}))
"""
NAMES = ("GPT2LMHeadModel", "ours", "ours, chunked loss")


def run(name: str, folder: Path, batch: int, length: int, steps: int, device: str) -> dict:
    """Seconds a step, losses and peak memory of one model."""
    # Weights that are split as they are read stay in memory twice, as pages of the file.
    folder = folder if name == "GPT2LMHeadModel" else in_our_format(folder)
    sizes = [str(number) for number in (batch, length, steps)]
    done = subprocess.run(
        [sys.executable, "-c", STEP, name, folder, *sizes, device],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def training(folder: Path, rounds: int, device: str) -> dict[str, Any]:
    """All under bfloat16 autocast with AdamW, in turns; then 50 short steps for the losses."""
    results: dict[str, list[dict]] = {name: [] for name in NAMES}
    for _ in range(rounds):
        for name in NAMES:
            results[name].append(run(name, folder, BATCH, LENGTH, STEPS, device))
    tokens = BATCH * LENGTH
    curves = {name: run(name, folder, 2, 64, 50, device)["losses"] for name in NAMES}
    exact = curves["GPT2LMHeadModel"]
    seconds = {
        name: [second for result in runs for second in result["seconds"]]
        for name, runs in results.items()
    }
    return {
        "unit": "tokens/s",
        "rates": rates(tokens, seconds),
        "peak, GB": {n: max(r["peak"] for r in runs) / 1e9 for n, runs in results.items()},
        "largest relative difference of 50 losses": {
            name: max(abs(a - b) / b for a, b in zip(curve, exact, strict=True))
            for name, curve in curves.items()
        },
    }
