"""How long it takes to begin: imports, and `from_pretrained`."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from .timing import in_turns, rates

_CLOCK = "import time; start = time.perf_counter()\n{work}\nprint(time.perf_counter() - start)"
_THEIRS = "from transformers import GPT2LMHeadModel, GPT2TokenizerFast, Trainer"
_IMPORTS = {
    "transformers' classes": _THEIRS,
    "the same, and ours": f"{_THEIRS}\nimport hf_scratch_gpt",
}


def imports(rounds: int) -> dict[str, Any]:
    """Seconds to import transformers' classes, and ours after them."""

    def run(work: str) -> float:
        command = [sys.executable, "-c", _CLOCK.format(work=work)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return float(done.stdout.split()[-1])

    best = {name: min(run(work) for _ in range(rounds)) for name, work in _IMPORTS.items()}
    theirs, both = best.values()
    return {"seconds": best, "added, ms": 1000 * (both - theirs)}


def loading(folder: Path, rounds: int) -> dict[str, Any]:
    """Loads a second by `from_pretrained`, of a checkpoint of GPT-2's and of one of ours."""
    from transformers import GPT2LMHeadModel

    from hf_scratch_gpt import ScratchGPTForCausalLM

    own = folder.parent / f"{folder.name}-ours"
    if not own.exists():
        ScratchGPTForCausalLM.from_pretrained(folder).save_pretrained(own)
    ways = {
        "GPT2LMHeadModel": lambda: GPT2LMHeadModel.from_pretrained(folder),
        "ours": lambda: ScratchGPTForCausalLM.from_pretrained(own),
        "ours, from GPT-2's": lambda: ScratchGPTForCausalLM.from_pretrained(folder),
    }
    for way in ways.values():
        way()
    return {"unit": "loads/s", "rates": rates(1, in_turns(ways, rounds))}
