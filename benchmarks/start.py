"""How long it takes to begin: imports, and `from_pretrained`."""

import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from .peers import in_our_format
from .timing import in_turns, rates

_IMPORTS = """
import time
from transformers import GPT2LMHeadModel, GPT2TokenizerFast, Trainer
start = time.perf_counter()
import hf_scratch_gpt
print(time.perf_counter() - start)
"""


def imports(rounds: int) -> dict[str, Any]:
    """Milliseconds that importing the package adds to importing transformers' classes."""
    # Both from bytecode, as installed packages are; an editable one writes it when first imported.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

    def run() -> float:
        command = [sys.executable, "-c", _IMPORTS]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return float(done.stdout.split()[-1])

    run()
    return {"added, ms": 1000 * statistics.median(run() for _ in range(rounds))}


def loading(folder: Path, rounds: int) -> dict[str, Any]:
    """Loads a second by `from_pretrained`, of a checkpoint of GPT-2's and of one of ours."""
    from transformers import GPT2LMHeadModel

    from hf_scratch_gpt import ScratchGPTForCausalLM

    own = in_our_format(folder)
    ways = {
        "GPT2LMHeadModel": lambda: GPT2LMHeadModel.from_pretrained(folder),
        "ours": lambda: ScratchGPTForCausalLM.from_pretrained(own),
        "ours, from GPT-2's": lambda: ScratchGPTForCausalLM.from_pretrained(folder),
    }
    for way in ways.values():
        way()
    # A load takes a twentieth of a second, so chance needs more of them.
    return {"unit": "loads/s", "rates": rates(1, in_turns(ways, 10 * rounds))}
