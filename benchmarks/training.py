"""A training step: tokens a second and peak memory, if the losses are the same."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from hf_scratch_gpt import ScratchGPTConfig

from .peers import DTYPES, in_our_format
from .timing import matrix_peak, rates

BATCH, LENGTH, STEPS = 2, 512, 3
_LONG = 90  # seconds
# In a process of its own, since peak memory is a process's.
STEP = """
import json, re, sys
import torch
from benchmarks.nano import NanoGPT
from benchmarks.timing import seconds_of
from torch.nn import functional as F
from transformers import GPT2LMHeadModel
from hf_scratch_gpt import ScratchGPTForCausalLM
from hf_scratch_gpt.engine.swap import optimize_for_training

name, folder, dtype, device, *sizes = sys.argv[1:]
batch, length, steps = map(int, sizes)
none = dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
if "ours" not in name:
    model = GPT2LMHeadModel.from_pretrained(folder, use_cache=False, **none)
else:
    model = ScratchGPTForCausalLM.from_pretrained(
        folder, chunked_loss="loss in pieces" in name, use_cache=False, drop_rate=0.0
    )
if "nanoGPT" in name:
    model = NanoGPT(model)
model.train().to(device)
loss_of = lambda ids: model(ids, labels=ids).loss
if "fast" in name:
    optimize_for_training(model)
elif "nanoGPT" in name:
    loss_of = torch.compile(model)
elif "pieces" in name and "ours" not in name:
    def loss_of(ids):
        hidden = model.transformer(ids)[0][:, :-1].flatten(0, 1)
        given = hidden, model.lm_head.weight, ids[:, 1:].flatten()
        return F.linear_cross_entropy(*given, options=torch.nn.LinearCrossEntropyOptions())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
generator = torch.Generator().manual_seed(0)
# Frequent and rare tokens as in texts (Zipf), so that there is something to learn.
frequency = 1 / torch.arange(1, 50258)
losses, times = [], []

def step():
    ids = frequency.multinomial(batch * length, replacement=True, generator=generator)
    ids = ids.view(batch, length).to(device)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = loss_of(ids)
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
NAMES = (PEER, "nanoGPT, compiled", "ours, plain", "ours, fast")
IN_PIECES = (f"{PEER}, loss in pieces", "ours, fast, loss in pieces")


def run(name: str, folder: Path, dtype: str, device: str) -> dict | None:
    """Losses and peak memory of one model, and seconds a step, without the first.

    None if it takes longer than `_LONG`.
    """
    # Weights that are split as they are read stay in memory twice, as pages of the file.
    folder = in_our_format(folder) if "ours" in name else folder
    sizes = [str(number) for number in (BATCH, LENGTH, STEPS)]
    command = [sys.executable, "-c", STEP, name, folder, dtype, device, *sizes]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_LONG)
    except subprocess.TimeoutExpired:
        return None
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


def training(folder: Path, dtype: str, device: str, has_long: bool) -> dict[str, Any]:
    """AdamW, under autocast where `dtype` is bfloat16; each model once, as its steps are long."""
    # torch's own loss in pieces makes a step on a CPU twice as long.
    names = (*NAMES, *IN_PIECES) if has_long or device != "cpu" else NAMES
    results, left_out = {}, []
    for name in names:
        result = run(name, folder, dtype, device)
        if result is None:
            left_out.append(f"{name} (three steps take more than {_LONG} seconds)")
        else:
            results[name] = result
            print(f"  {name}: {min(result['seconds']):.3g} s a step", flush=True)
    tolerance = {"float32": 1e-4, "bfloat16": 1e-2}[dtype]
    exact = results.get(PEER, next(iter(results.values())))["losses"]
    for name, result in results.items():
        for own, theirs in zip(result["losses"], exact, strict=True):
            assert abs(own / theirs - 1) < tolerance, f"{name} has loss {own}, {PEER} {theirs}"
    return {
        "unit": "tokens/s",
        "rates": rates(BATCH * LENGTH, {n: result["seconds"] for n, result in results.items()}),
        "limit": matrix_peak(DTYPES[dtype], device) / flops(folder, LENGTH),
        "tokens": {"texts": BATCH, "of each": LENGTH},
        "peak, GB": {name: result["peak"] / 1e9 for name, result in results.items()},
        "left out": left_out,
    }
