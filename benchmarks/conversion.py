"""Memory and time of a conversion, beside loading and saving with transformers.

`python -m benchmarks.conversion WORKPLACE [--preset gpt2-xl]` writes a random GPT-2 of that size to
the folder WORKPLACE, in transformers' format, as a pickle and in OpenAI's, and converts it; each
way runs in a process of its own, in turns. It takes 31 GB for gpt2-xl.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

OURS = "from conversion.convert_gpt2 import main; assert main(sys.argv[1:]) == 0"
THEIRS = """
from transformers import GPT2LMHeadModel
GPT2LMHeadModel.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""
# In a process of its own: a child's peak memory begins at its parent's.
MAKE = """
import sys
from pathlib import Path
import torch
from transformers import GPT2LMHeadModel
from hf_scratch_gpt.checkpoints.verify import gpt2_config
from hf_scratch_gpt import ScratchGPTConfig
from tests.checkpoints.releases import write_release

preset, workplace, vocabulary = sys.argv[1], *map(Path, sys.argv[2:])
config = ScratchGPTConfig.from_preset(preset)
torch.manual_seed(0)
model = GPT2LMHeadModel(gpt2_config(config))
model.save_pretrained(workplace / "hf")
model.config.save_pretrained(workplace / "pickle")
torch.save(model.state_dict(), workplace / "pickle" / "pytorch_model.bin")
# As many tokens as the tiny vocabulary has; that makes it 0.3 GB smaller.
model.resize_token_embeddings(400)
write_release(workplace / "openai", vocabulary, model)
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
    parser.add_argument("workplace", type=Path, help="a folder with room for five such models")
    parser.add_argument("--preset", default="gpt2-xl")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    out = options.workplace / "out"
    if not (options.workplace / "openai" / "model.ckpt.index").exists():
        vocabulary = Path(__file__).parent.parent / "tests" / "fixtures" / "openai-tiny"
        command = [sys.executable, "-c", MAKE, options.preset, options.workplace, vocabulary]
        subprocess.run(command, check=True)
    size = (options.workplace / "hf" / "model.safetensors").stat().st_size
    ways = {
        "transformers, load and save": (THEIRS, "hf", ()),
        "conversion": (OURS, "hf", ()),
        "conversion, not compared": (OURS, "hf", ("--no-verify",)),
        "conversion to bfloat16": (OURS, "hf", ("--dtype", "bfloat16")),
        "conversion of a pickle": (OURS, "pickle", ()),
        "conversion of OpenAI's": (OURS, "openai", ()),
        "OpenAI's to bfloat16": (OURS, "openai", ("--dtype", "bfloat16")),
    }
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, (work, source, arguments) in ways.items():
            shutil.rmtree(out, ignore_errors=True)
            results[name].append(run(work, str(options.workplace / source), str(out), *arguments))
    shutil.rmtree(out, ignore_errors=True)
    baseline = statistics.median(seconds for seconds, _ in next(iter(results.values())))
    print(f"{options.preset}, {size / 1e9:.2f} GB in float32")
    for name, runs in results.items():
        times = [seconds for seconds, _ in runs]
        seconds = statistics.median(times)
        peak = max(peak for _, peak in runs)
        print(
            f"{name:28} {seconds:6.1f} s ({min(times):.1f} to {max(times):.1f})  "
            f"{seconds / baseline:5.2f} of transformers'   "
            f"peak {peak / 1e9:6.2f} GB  {peak / size:5.2f} of the model"
        )


if __name__ == "__main__":
    main()
