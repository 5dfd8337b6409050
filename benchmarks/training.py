"""A training step: tokens a second and peak memory, if the losses are the same."""

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
SHORT = 64
# In a process of its own, since peak memory is a process's.
STEP = """
import json, re, sys
import torch
from benchmarks.timing import seconds_of
from transformers import GPT2LMHeadModel
from hf_scratch_gpt import ScratchGPTForCausalLM
from hf_scratch_gpt.engine.swap import optimize_for_training

name, folder, dtype, device, *sizes = sys.argv[1:]
batch, length, steps = map(int, sizes)
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

def step():
    ids = frequency.multinomial(batch * length, replacement=True, generator=generator)
    ids = ids.view(batch, length).to(device)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
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
PEER = "GPT2LMHeadModel"
NAMES = (PEER, "ours, plain", "ours, fast", "ours, fast, loss in pieces")


def run(name: str, folder: Path, dtype: str, length: int, device: str) -> dict:
    """Losses and peak memory of one model, and seconds a step, without the first."""
    # Weights that are split as they are read stay in memory twice, as pages of the file.
    folder = folder if name == PEER else in_our_format(folder)
    sizes = [str(number) for number in (BATCH, length, STEPS)]
    command = [sys.executable, "-c", STEP, name, folder, dtype, device, *sizes]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
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
    """AdamW, under autocast where `dtype` is bfloat16.

    Where the CPU has no instructions for `dtype`, the peer is a hundred times slower: texts are
    shorter then.
    """
    is_slow_here = device == "cpu" and is_slow(DTYPES[dtype])
    length, rounds = (SHORT, 1) if is_slow_here else (LENGTH, min(rounds, 3))
    results: dict[str, list[dict]] = {name: [] for name in NAMES}
    for _ in range(rounds):
        for name in NAMES:
            results[name].append(run(name, folder, dtype, length, device))
    tolerance = {"float32": 1e-4, "bfloat16": 1e-2}[dtype]
    for name, runs in results.items():
        for ours, exact in zip(runs[0]["losses"], results[PEER][0]["losses"], strict=True):
            assert abs(ours / exact - 1) < tolerance, f"{name} has loss {ours}, {PEER} {exact}"
    seconds = {
        name: [second for result in runs for second in result["seconds"]]
        for name, runs in results.items()
    }
    return {
        "unit": "tokens/s",
        "rates": rates(BATCH * length, seconds),
        "limit": matrix_peak(DTYPES[dtype], device) / flops(folder, length),
        "tokens": {"texts": BATCH, "of each": length},
        "peak, GB": {n: max(run["peak"] for run in runs) / 1e9 for n, runs in results.items()},
    }
