"""Measure this package and its peers side by side: `python -m benchmarks`.

Random weights of GPT-2's size, the same for all; rounds in turns; what is written or scored
is compared as well. CTranslate2 and llama.cpp take part where they are installed
(`pip install -e '.[benchmarks]'`), OpenVINO where `--openvino` names its environment's interpreter.
A peer that takes ten times the median of all is left out; the table says so. `--notes` keeps the
standing in benchmarks/NOTES.md.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from hf_scratch_gpt.engine.half import is_slow

from . import generation, start
from .peers import DTYPES, make_weights
from .report import draw, keep_standing, processor, table
from .training import training

NOTES = Path(__file__).with_name("NOTES.md")


# Each line of writing: texts, tokens of each prompt, tokens written, and in which weights.
LINES = {
    "one text, 32 + 64": (1, 32, 64, ("float32", "bfloat16", "int8")),
    "prompt of 1,000": (1, 1000, 1, ("float32", "bfloat16", "int8")),
    "8 texts, 32 + 32": (8, 32, 32, ("float32", "bfloat16", "int8")),
    "32 texts, 32 + 8": (32, 32, 8, ("float32", "int8")),
    "32 texts, 32 + 32": (32, 32, 32, ("float32", "int8")),
}
LONG_LINES = {
    "32 texts, 32 + 128": (32, 32, 128, ("float32", "int8")),
    "128 texts, 32 + 32": (128, 32, 32, ("float32", "int8")),
}


def measurements(
    folder: Path, rounds: int, device: str, openvino: str | None, has_long: bool
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Each measurement by its name."""
    named: dict[str, Callable[[], dict[str, Any]]] = {}
    dtypes = ("float32", "bfloat16") if device == "cpu" else ("bfloat16",)
    lines = LINES | (LONG_LINES if has_long else {})
    for weights in (*dtypes, "int8") if device == "cpu" else dtypes:  # peers are started once
        for line, (*sizes, kinds) in lines.items():
            if device != "cpu" or weights in kinds:
                named[f"{line}, {weights}"] = partial(
                    generation.writing, folder, weights, rounds, device, openvino, *sizes
                )
    if has_long:
        named["64 requests"] = partial(generation.requests, folder, rounds, device)
    for dtype in dtypes:
        if device == "cpu" and is_slow(DTYPES[dtype]):
            continue  # nobody trains in a type that is forty times slower than float32
        named[f"training, {dtype}"] = partial(training, folder, dtype, device, has_long)
    named["from_pretrained"] = partial(start.loading, folder, rounds)
    for texts in (1, 10_000):
        named[f"tokenization, 2 MB in {texts:,}"] = partial(start.tokenization, texts, rounds)
    return named


def main() -> None:
    """Measure, print the table, draw it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--preset", default="gpt2", help="size of the model, such as gpt2-xl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="measurements whose name has this, such as 'one text'")
    parser.add_argument("--long", action="store_true", help="lines that take minutes each, too")
    parser.add_argument("--openvino", help="the interpreter of an environment with optimum-intel")
    parser.add_argument("--notes", action="store_true", help="keep the standing in NOTES.md")
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
        planned = measurements(folder, options.rounds, device, options.openvino, options.long)
        for name, measure in planned.items():
            if (options.only or "") in name:
                results[name] = measure()
                print(table({name: results[name]}), flush=True)
                if options.notes:
                    keep_standing({name: results[name]}, NOTES, processor())
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    if any("rates" in result for result in results.values()):
        draw(results, options.png)
        print(f"picture: {options.png}")


if __name__ == "__main__":
    main()
