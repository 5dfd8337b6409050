"""Save a model in transformers' GPT-2 format.

The result loads with `GPT2LMHeadModel` and `AutoTokenizer` without this package, and in the tools
that know only transformers' GPT-2.
"""

from pathlib import Path

from transformers import GPT2LMHeadModel, GPT2TokenizerFast

from ..files import new_folder
from ..model.tokenization_scratch_gpt import ScratchGPTTokenizer
from .assemble import common_dtype, plan_export
from .hf_gpt2 import read_hf_gpt2
from .saved import read_saved, save_all_but_weights
from .sources import told_as_error
from .verify import gpt2_config, verify
from .weights import write_weights

# Where our files came from, and where their code is; GPT-2's own needs none.
_OUR_SETTINGS = ("auto_map", "is_local", "local_files_only")


def export(source: Path, out: Path) -> list[str]:
    """Write the model saved in the folder `source` to `out` in transformers' GPT-2 format.

    `out` appears all at once, when all is written and its logits are compared with the source's.

    Args:
        out: as `files.destination` returns it; it is replaced if it is there.

    Returns:
        Lines that tell what was checked and written.

    Raises:
        ValueError: `source` is not a model of ours or is damaged, or the logits differ.
    """
    config, stored = read_saved(source)
    pieces = plan_export(stored, config)
    dtype = common_dtype(pieces)
    with new_folder(out) as complete:
        save_all_but_weights(GPT2LMHeadModel, gpt2_config(config), dtype, source, complete)
        if any((source / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            _save_tokenizer(source, complete)
        write_weights(complete, pieces, dtype)
        largest, mean = verify(read_hf_gpt2(str(complete)), source)
    return [
        f"checked  logits differ by {largest:.2g} at most, {mean:.2g} on average",
        f"wrote    {out}",
    ]


def _save_tokenizer(source: Path, out: Path) -> None:
    """Save the vocabulary of `source` in `out` as GPT-2's."""
    with told_as_error(source):
        ours = ScratchGPTTokenizer.from_pretrained(source)
        theirs = GPT2TokenizerFast.from_pretrained(source)
    for name in _OUR_SETTINGS:
        theirs.init_kwargs.pop(name, None)
    theirs.save_pretrained(out)
    ours.save_vocabulary(out)
