"""Measure this package and its peers side by side: `python -m benchmarks`.

Random weights of GPT-2's size, the same for all; rounds in turns; what is written or scored
is compared before it is timed. CTranslate2 and llama.cpp take part where they are installed
(`pip install -e '.[benchmarks]'`). Conversion of large models and tokenization of real texts have
more to say for themselves: `python -m benchmarks.conversion`, `python -m benchmarks.tokenization`.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from . import conversion, generation, start, tokenization
from .peers import make_weights
from .report import draw, table
from .timing import rates
from .training import training

TINY = Path(__file__).parent.parent / "tests" / "fixtures" / "openai-tiny"


def measurements(folder: Path, rounds: int, device: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """Each measurement by its name."""
    named: dict[str, Callable[[], dict[str, Any]]] = {}
    for weights in ("float32", "bfloat16", "int8") if device == "cpu" else ("bfloat16",):
        named[f"decode {weights}"] = lambda weights=weights: generation.decode(
            folder, weights, rounds, device
        )
    for dtype in ("float32", "bfloat16") if device == "cpu" else ("bfloat16",):
        named[f"prefill {dtype}"] = lambda dtype=dtype: generation.prefill(
            folder, dtype, rounds, device
        )
        named[f"32 texts {dtype}"] = lambda dtype=dtype: generation.batch(
            folder, dtype, rounds, device
        )
        named[f"training {dtype}"] = lambda dtype=dtype: training(folder, dtype, rounds, device)
    named["perplexity"] = lambda: generation.perplexity(folder, device)
    named["from_pretrained"] = lambda: start.loading(folder, rounds)
    named["import"] = lambda: start.imports(rounds)
    named["conversion"] = lambda: _conversion(folder, rounds)
    named["tokenization, 10 MB by 400 tokens"] = lambda: _tokenization(rounds)
    return named


def _conversion(folder: Path, rounds: int) -> dict[str, Any]:
    out = folder.parent / "converted"
    ways = {"GPT2LMHeadModel, load and save": conversion.THEIRS, "ours": conversion.OURS}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            with tempfile.TemporaryDirectory(dir=out.parent) as place:
                target = str(Path(place) / "out")
                seconds[name].append(conversion.run(work, str(folder), target)[0])
    return {"unit": "conversions/s", "rates": rates(1, seconds)}


def _tokenization(rounds: int) -> dict[str, Any]:
    measured = tokenization.measure(rounds, TINY)["one text of 10 MB"]
    return {"unit": "MB/s", "rates": rates(tokenization.LARGE / 1e6, measured)}


def main() -> None:
    """Measure, print the table, draw it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--preset", default="gpt2", help="size of the model, such as gpt2-xl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="measurements whose name begins so, such as decode")
    parser.add_argument("--workplace", type=Path, help="folder for weights, kept; 2 GB for gpt2")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--png", type=Path, default=Path("benchmarks.png"), help="the picture")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = "cpu"
    if torch.accelerator.is_available():
        device = str(torch.accelerator.current_accelerator())
    else:
        print("not measured: a GPU, as there is none")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.workplace or Path(temporary)) / options.preset
        folder.parent.mkdir(parents=True, exist_ok=True)
        make_weights(folder, options.preset)
        results = {}
        for name, measure in measurements(folder, options.rounds, device).items():
            if name.startswith(options.only or ""):
                results[name] = measure()
                print(table({name: results[name]}), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    if any("rates" in result for result in results.values()):
        draw(results, options.png)
        print(f"picture: {options.png}")


if __name__ == "__main__":
    main()
