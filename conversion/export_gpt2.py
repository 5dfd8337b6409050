"""Save a model in transformers' GPT-2 format: `python -m conversion.export_gpt2 SOURCE OUT`.

OUT loads with `GPT2LMHeadModel` and `AutoTokenizer` without this package, and in the tools that
know transformers' GPT-2 alone.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel, GPT2TokenizerFast

from hf_scratch_gpt import ScratchGPTForCausalLM, ScratchGPTTokenizer

from .assemble import disassemble
from .commands import run_command
from .verify import gpt2_config


def export(source: str, out: Path) -> None:
    """Write the model saved in the folder `source` to `out` in transformers' GPT-2 format.

    Raises:
        ValueError: `out` is there and not empty.
    """
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} exists already; choose another folder")
    model = ScratchGPTForCausalLM.from_pretrained(source)
    tensors = dict(model.named_parameters())
    config = gpt2_config(model.config)
    with torch.device("meta"):
        theirs = GPT2LMHeadModel(config).to(model.dtype)
    theirs.generation_config = model.generation_config
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as unfinished:
        complete = Path(unfinished) / out.name
        theirs.save_pretrained(complete, state_dict=disassemble(tensors, model.config))
        if any((Path(source) / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            tokenizer = ScratchGPTTokenizer.from_pretrained(source)
            GPT2TokenizerFast.from_pretrained(source).save_pretrained(complete)
            tokenizer.save_vocabulary(complete)
        if out.exists():
            out.rmdir()
        complete.rename(out)
    print(f"wrote {out}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m conversion.export_gpt2", description=__doc__)
    parser.add_argument("source", help="folder of a saved model")
    parser.add_argument("out", help="folder to write")
    options = parser.parse_args(arguments)
    return run_command(lambda: export(options.source, Path(options.out)))


if __name__ == "__main__":
    sys.exit(main())
