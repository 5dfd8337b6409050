"""Save a model in transformers' GPT-2 format: `python -m conversion.export_gpt2 SOURCE OUT`.

OUT loads with `GPT2LMHeadModel` and `AutoTokenizer` without this package, and in the tools that
know transformers' GPT-2 alone.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel, GPT2TokenizerFast

from ..files import destination, new_folder
from ..model.tokenization_scratch_gpt import ScratchGPTTokenizer
from .assemble import disassemble
from .commands import run_command
from .hf_gpt2 import read_hf_gpt2
from .saved import read_generation_config, read_saved
from .sources import StoredTensor, told_as_error
from .verify import gpt2_config, verify

# Where our files came from, and where their code is; GPT-2's own needs none.
_OUR_SETTINGS = ("auto_map", "is_local", "local_files_only")


def export(source: str, out: str, overwrite: bool = False) -> None:
    """Write the model saved in the folder `source` to `out` in transformers' GPT-2 format.

    `out` appears all at once, when all is written and its logits are compared with the source's.
    `overwrite` lets it replace a folder that holds files.

    Raises:
        ValueError: `out` is there and not empty, `source` is no model of ours or is damaged, or
            the logits differ.
    """
    folder, target = Path(source), destination(out, overwrite, [source])
    config, stored = read_saved(folder)
    tensors = {name: _read(tensor) for name, tensor in stored.items()}
    with torch.device("meta"):
        theirs = GPT2LMHeadModel(gpt2_config(config))
    theirs.to(tensors["model.embed_tokens.weight"].dtype)
    generation_config = read_generation_config(folder, config)
    if generation_config is not None:
        theirs.generation_config = generation_config
    with new_folder(target) as complete:
        theirs.save_pretrained(complete, state_dict=disassemble(tensors, config))
        if any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            _save_tokenizer(folder, complete)
        verify(read_hf_gpt2(str(complete)), folder)
    print(f"wrote {target}")


def _read(stored: StoredTensor) -> torch.Tensor:
    tensor = stored.read()
    lowest, highest = tensor.aminmax()  # both are NaN if any value is
    if not (lowest.isfinite() and highest.isfinite()):
        raise ValueError(f"{stored.where} holds NaN or infinity")
    return tensor


def _save_tokenizer(source: Path, out: Path) -> None:
    """Save the vocabulary of `source` in `out` as GPT-2's."""
    with told_as_error(source):
        ours = ScratchGPTTokenizer.from_pretrained(source)
        theirs = GPT2TokenizerFast.from_pretrained(source)
    for name in _OUR_SETTINGS:
        theirs.init_kwargs.pop(name, None)
    theirs.save_pretrained(out)
    ours.save_vocabulary(out)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m conversion.export_gpt2", description=__doc__)
    parser.add_argument("source", help="folder of a saved model")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    options = parser.parse_args(arguments)
    return run_command(lambda: export(options.source, options.out, options.overwrite))


if __name__ == "__main__":
    sys.exit(main())
