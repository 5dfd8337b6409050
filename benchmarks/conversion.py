"""Memory and time of a conversion, beside loading and saving with transformers.

`python -m benchmarks.conversion WORKPLACE [--preset gpt2-xl]` writes a random GPT-2 of that size to
the folder WORKPLACE and converts it; each way runs in a process of its own, in turns.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

OURS = "from conversion.convert_gpt2 import main; main(sys.argv[1:])"
THEIRS = """
from transformers import GPT2LMHeadModel
GPT2LMHeadModel.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""
MAKE = """
import sys
import torch
from transformers import GPT2LMHeadModel
from conversion.verify import gpt2_config
from hf_scratch_gpt import ScratchGPTConfig
torch.manual_seed(0)
GPT2LMHeadModel(gpt2_config(ScratchGPTConfig.from_preset(sys.argv[1]))).save_pretrained(sys.argv[2])
"""
MEASURE = """
import resource, sys, time
import torch, transformers
{imports}
start = time.perf_counter()
{work}
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def run(work: str, *arguments: str) -> tuple[float, float]:
    """Seconds, without the imports, and peak resident bytes of `work` in a fresh process."""
    imports = "from transformers import GPT2LMHeadModel\nimport conversion.convert_gpt2"
    code = MEASURE.format(imports=imports, work=work)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True
    )
    seconds, peak = done.stdout.split("\n")[-2].split()
    return float(seconds), float(peak)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workplace", type=Path, help="a folder with room for three such models")
    parser.add_argument("--preset", default="gpt2-xl")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    source, out = options.workplace / "source", options.workplace / "out"
    if not source.exists():
        # In a process of its own: a child's peak memory begins at its parent's.
        subprocess.run([sys.executable, "-c", MAKE, options.preset, str(source)], check=True)
    size = (source / "model.safetensors").stat().st_size
    ways = {
        "transformers, load and save": (THEIRS, ()),
        "conversion": (OURS, ()),
        "conversion, not compared": (OURS, ("--no-verify",)),
        "conversion to bfloat16": (OURS, ("--dtype", "bfloat16")),
    }
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, (work, arguments) in ways.items():
            shutil.rmtree(out, ignore_errors=True)
            results[name].append(run(work, str(source), str(out), *arguments))
    shutil.rmtree(out, ignore_errors=True)
    baseline = statistics.median(seconds for seconds, _ in next(iter(results.values())))
    print(f"{options.preset}, {size / 1e9:.2f} GB in float32")
    for name, runs in results.items():
        seconds = statistics.median(seconds for seconds, _ in runs)
        peak = max(peak for _, peak in runs)
        print(
            f"{name:28} {seconds:7.1f} s  {seconds / baseline:5.2f} of transformers'   "
            f"peak {peak / 1e9:6.2f} GB  {peak / size:5.2f} of the model"
        )


if __name__ == "__main__":
    main()
