"""Time our tokenizer, GPT2TokenizerFast and bare tiktoken on the same texts, side by side.

`python -m benchmarks.tokenization FOLDER` takes the vocabulary from FOLDER, which holds OpenAI's
`encoder.json` and `vocab.bpe`. Rounds are interleaved, since machines are noisy; the medians count.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

from transformers import GPT2TokenizerFast

from hf_scratch_gpt import ScratchGPTTokenizer

LARGE = 10_000_000
OURS, FAST, TIKTOKEN = "ours", "GPT2TokenizerFast", "tiktoken"


def texts() -> dict[str, str | list[str]]:
    """One large text, many short ones, and one short one, from Python's own manual."""
    manual = "\n".join(topics.values())
    large = (manual * (LARGE // len(manual) + 1))[:LARGE]
    lines = [line for line in large[: LARGE // 5].split("\n") if line.strip()]
    return {
        "one text of 10 MB": large,
        "10,000 short texts": lines[:10_000],
        "one short text": "The quick brown fox jumps over the lazy dog.",
    }


def measure(rounds: int, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Seconds of each round, by workload and tokenizer; outputs are compared before any timing."""
    vocab, merges = str(folder / "encoder.json"), str(folder / "vocab.bpe")
    ours = ScratchGPTTokenizer(vocab, merges)
    fast = GPT2TokenizerFast(vocab=vocab, merges=merges)
    bare = ours.tiktoken

    def by_tiktoken(text: str | list[str]) -> list:
        if isinstance(text, str):
            return bare.encode_ordinary(text)
        return [bare.encode_ordinary(one) for one in text]

    seconds: dict[str, dict[str, list[float]]] = {}
    for workload, text in texts().items():
        ways: dict[str, Callable[[], object]] = {
            OURS: lambda text=text: ours(text, verbose=False)["input_ids"],
            FAST: lambda text=text: fast(text, verbose=False)["input_ids"],
            TIKTOKEN: lambda text=text: by_tiktoken(text),
        }
        ids = {name: way() for name, way in ways.items()}
        assert ids[OURS] == ids[FAST] == ids[TIKTOKEN], f"{workload}: ids differ"
        repeats = 1000 if workload == "one short text" else 1
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                for _ in range(repeats):
                    way()
                times[name].append((time.perf_counter() - start) / repeats)
        seconds[workload] = times
    return seconds


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="OpenAI's encoder.json and vocab.bpe")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print all seconds as JSON")
    options = parser.parse_args()
    seconds = measure(options.rounds, options.folder)
    if options.json:
        json.dump(seconds, sys.stdout, indent=2)
        return
    print(f"{'':20} {OURS:>12} {FAST:>18} {TIKTOKEN:>12} {'over fast':>10} {'over tiktoken':>14}")
    for workload, times in seconds.items():
        median = {name: statistics.median(values) for name, values in times.items()}
        spread = max(max(values) / min(values) for values in times.values())
        print(
            f"{workload:20} {median[OURS] * 1e3:9.3f} ms {median[FAST] * 1e3:15.3f} ms "
            f"{median[TIKTOKEN] * 1e3:9.3f} ms {median[FAST] / median[OURS]:9.2f}x "
            f"{median[TIKTOKEN] / median[OURS]:13.2f}x   (spread {spread:.1f}x)"
        )


if __name__ == "__main__":
    main()
