"""Measure this package and GPT2LMHeadModel on a GPU: `python -m benchmarks.gpu`.

At most eight minutes on an H100. Each figure is printed as it comes, and kept in a file of JSON,
so that a run that is stopped leaves what it has. Weights are random. `--device cpu --tiny` tries
the script without a GPU.
"""

import argparse
import copy
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig, GPT2LMHeadModel, PreTrainedModel
from transformers.utils import logging

from hf_scratch_gpt import (
    ScratchGPTConfig,
    ScratchGPTForCausalLM,
    optimize_for_generation,
    optimize_for_training,
)
from hf_scratch_gpt.checkpoints.verify import gpt2_config

from .peers import by_generate
from .timing import best_seconds, matrix_peak, read_bandwidth, seconds_of, synchronize

_ROUNDS = 3
TINY = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=1000)


class Run:
    """Figures as they come, in a file, until the time is up."""

    def __init__(self, path: Path, minutes: float, sizes: dict[str, int]) -> None:
        self._path, self._end, self.sizes = path, time.monotonic() + 60 * minutes, sizes
        self.figures: dict[str, Any] = {}

    def measure(self, name: str, work: Callable[[], dict[str, float]]) -> None:
        """What `work` gives under `name`, or why it gives nothing; not once the time is up."""
        if time.monotonic() > self._end:
            figures: Any = "left out: no time"
        else:
            try:
                figures = {key: float(f"{value:.4g}") for key, value in work().items()}
            except Exception as error:  # a kind that is not installed, too little memory
                told = str(error).strip().splitlines() or [type(error).__name__]
                figures = f"left out: {told[0][:200]}"
        self.figures[name] = figures
        print(f"{name}: {figures}", flush=True)
        self._path.write_text(json.dumps(self.figures, indent=2) + "\n")


def make(preset: str, device: str, **changes: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """transformers' model and ours, of one size, in bfloat16; their weights differ."""
    config = ScratchGPTConfig.from_preset(preset, **changes)
    with torch.device(device):
        models = GPT2LMHeadModel(gpt2_config(config)), ScratchGPTForCausalLM(config)
    for model in models:
        model.generation_config.eos_token_id = None
    theirs, ours = (model.eval().to(torch.bfloat16) for model in models)
    return theirs, ours


def decode(
    model: PreTrainedModel, texts: int, written: int, bandwidth: float, **arguments: Any
) -> dict[str, float]:
    """Tokens a second after a prompt of 32, and the share of memory's bandwidth in weights."""
    device = str(model.device)
    ids = torch.randint(0, model.config.vocab_size, (texts, 32), device=device)

    write = by_generate(model, **arguments)
    first = seconds_of(lambda: write(ids, written), device)  # it compiles
    short, whole = (
        min(seconds_of(lambda count=count: write(ids, count), device) for _ in range(_ROUNDS))
        for count in (2, written)
    )
    step = (whole - short) / (written - 2)
    weights = sum(part.weight.nbytes for part in _matrices(model))
    shares = {"bandwidth used": weights / step / bandwidth}
    return {"tokens/s": texts * written / whole, "first call, s": first, "step, ms": 1e3 * step} | (
        shares
    )


def _matrices(model: PreTrainedModel) -> list[Any]:
    kinds = ("Linear", "Conv1D")
    return [part for part in model.modules() if type(part).__name__ in kinds]


def prompt(model: PreTrainedModel, attention: str, tokens: int) -> dict[str, float]:
    """Tokens a second that are read of one text, by a kind of `attention`."""
    device = str(model.device)
    model.set_attn_implementation(attention)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=device)
    with torch.no_grad():
        seconds = best_seconds(lambda: model(ids, logits_to_keep=1), device)
    return {"tokens/s": tokens / seconds}


def train(model: PreTrainedModel, texts: int, tokens: int, peak: float) -> dict[str, float]:
    """Tokens a second of steps under AdamW and autocast, and model FLOPs utilisation.

    6 FLOPs for each weight of a matrix, and attention's (Kaplan et al. 2020, section 2.1).
    """
    device, config = str(model.device), model.config
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, config.vocab_size, (texts, tokens), device=device)

    def step() -> None:
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = best_seconds(step, device)
    attention = 6 * config.num_hidden_layers * tokens * config.hidden_size
    flops = 6 * sum(part.weight.numel() for part in _matrices(model)) + attention
    rate = texts * tokens / seconds
    return {"tokens/s": rate, "MFU": rate * flops / peak}


def generation(
    run: Run, preset: str, device: str, written: int, limits: tuple[float, float]
) -> None:
    """Decode, prompts and kinds of attention of one size."""
    theirs, ours = make(preset, device, **run.sizes)
    compiled = CompileConfig(fullgraph=True, mode="reduce-overhead")
    static: dict[str, Any] = {"cache_implementation": "static", "compile_config": compiled}
    fast = optimize_for_generation(copy.deepcopy(ours))
    ways: dict[str, tuple[PreTrainedModel, dict[str, Any]]] = {
        "GPT2LMHeadModel": (theirs, {}),
        "ours, plain": (ours, {}),
        "ours, fast": (fast, {}),
        "GPT2LMHeadModel, compiled": (theirs, static),
        "ours, compiled": (ours, static),
    }
    for texts in (1, 64):
        for name, (model, arguments) in ways.items():
            run.measure(
                f"{preset}, decode, {texts} texts, {name}",
                lambda model=model, given=arguments, texts=texts: decode(
                    model, texts, written, limits[0], **given
                ),
            )
    for name, model in (("GPT2LMHeadModel", theirs), ("ours", ours)):
        for kind in ("sdpa", "flex_attention", "flash_attention_2"):
            if kind == "flash_attention_2" and not importlib.util.find_spec("flash_attn"):
                continue
            run.measure(
                f"{preset}, prompt of 1,000, {name}, {kind}",
                lambda model=model, kind=kind: prompt(model, kind, 1000),
            )
    for weights in ("int8", "int4"):
        run.measure(
            f"{preset}, decode, 1 texts, ours, fast, {weights}",
            lambda weights=weights: decode(
                optimize_for_generation(
                    copy.deepcopy(make(preset, device, **run.sizes)[1]), weights
                ),
                *(1, written, limits[0]),
            ),
        )


def training(run: Run, preset: str, device: str, texts: int, limits: tuple[float, float]) -> None:
    """A step of transformers' model and of ours, plain, with a loss in pieces, and compiled."""
    tokens = min(1024, ScratchGPTConfig.from_preset(preset).max_position_embeddings)
    for name in ("GPT2LMHeadModel", "ours", "ours, loss in pieces", "ours, compiled"):

        def work(name: str = name) -> dict[str, float]:
            theirs, ours = make(
                preset, device, chunked_loss="pieces" in name, drop_rate=0.0, **run.sizes
            )
            model = (theirs if name == "GPT2LMHeadModel" else ours).float().train()
            if device == "cpu" and model is ours:
                optimize_for_training(model)
            if "compiled" in name:
                model.compile()
            return train(model, texts, tokens, limits[1])

        run.measure(f"{preset}, training, {texts} x {tokens}, {name}", work)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--presets", nargs="+", default=["gpt2", "gpt2-xl"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two narrow layers of each preset")
    parser.add_argument("--written", type=int, default=128, help="tokens of each text")
    parser.add_argument("--texts", type=int, default=16, help="of a training step")
    parser.add_argument("--minutes", type=float, default=8, help="nothing new begins after these")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    if options.device != "cpu" and not torch.accelerator.is_available():
        parser.error("there is no GPU; --device cpu tries the script on the CPU")
    logging.set_verbosity_error()
    sizes = TINY if options.tiny else {}
    run, device = Run(options.json, options.minutes, sizes), options.device
    bandwidth, peak = read_bandwidth(device), matrix_peak(torch.bfloat16, device)
    synchronize(device)
    limits = (bandwidth, peak)
    run.measure("limits", lambda: {"GB/s": bandwidth / 1e9, "TFLOP/s": peak / 1e12})
    training(run, options.presets[0], device, options.texts, limits)
    for preset in options.presets:
        generation(run, preset, device, options.written, limits)


if __name__ == "__main__":
    main()
