"""Convert an opened GPT-2 to a saved model of ours, and export one to transformers' format."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel, GPT2TokenizerFast

from ..cards import WEBTEXT, name_of, write_card
from ..files import new_folder
from ..model.modeling_scratch_gpt import ScratchGPTForCausalLM
from ..model.tokenization_scratch_gpt import ScratchGPTTokenizer
from .assemble import common_dtype, num_parameters, plan, plan_export
from .hf_gpt2 import read_hf_gpt2
from .hub import hub_id
from .saved import read_saved, save_all_but_weights
from .sources import GPT2Source, told_as_error
from .verify import gpt2_config, verify
from .vocabularies import has_vocabulary, other_vocabulary
from .weights import write_weights

# Where our files came from, and where their code is; GPT-2's own needs none.
_OUR_SETTINGS = ("auto_map", "is_local", "local_files_only")


def convert(
    source: GPT2Source,
    out: Path,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "50GB",
    check: bool = True,
    overwrite: bool = True,
) -> list[str]:
    """Convert `source` and save it in the folder `out`, as `files.destination` returns it.

    `out` appears all at once, when all is written and compared with the source. A conversion that
    fails or is killed leaves it as it was.

    Args:
        dtype: what to save in; None keeps the source's.
        max_shard_size: largest size of one weight file.
        check: compare the logits of the result with the source's.
        overwrite: replace what is at `out` when all is done.

    Returns:
        Lines that tell what was read, dropped, checked and written.

    Raises:
        ValueError: a tensor is missing, left over, misshapen or not finite.
        RuntimeError: the logits differ.
    """
    planned, checked = plan(source), None
    dtype, parameters = dtype or common_dtype(planned), num_parameters(planned)
    report = list(_read_and_dropped(source))
    with new_folder(out, overwrite) as complete:
        origin = Path(source.path)
        save_all_but_weights(ScratchGPTForCausalLM, source.config, dtype, origin, complete)
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(complete)
        for file in source.tokenizer_files:
            shutil.copy(file, complete)
        write_weights(complete, planned, dtype, max_shard_size)
        if check:
            checked = verify(source, complete)
            report.append(f"checked  {checked}")
        _write_card(complete, source, dtype, checked)
    report.append(f"wrote    {parameters:,} parameters in {dtype} to {out}")
    return report


def _read_and_dropped(source: GPT2Source) -> Iterator[str]:
    yield f"read     {len(source.tensors)} tensors of {source.path} ({source.origin})"
    for reason in dict.fromkeys(source.dropped.values()):
        names = [name for name, why in source.dropped.items() if why == reason]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"dropped  {names[0]}{more}: {reason}"
    yield from source.notes
    for file in source.unchecked:
        remedy = "`sha256sum FILE > SHA256SUMS` beside it would show a damaged bit"
        yield f"trusted  {file} has no checksum; {remedy}"
    if source.tokenizer_files:
        files = ", ".join(path.name for path in source.tokenizer_files)
        yield f"copied   {files}, as they are: not a vocabulary of GPT-2's kind"
    elif source.tokenizer is None:
        yield "lacks    a vocabulary; --tokenizer saves one with the model"


def _write_card(folder: Path, source: GPT2Source, dtype: torch.dtype, checked: str | None) -> None:
    """Write the card of what `source` became, in `folder`; `checked` says how they differ."""
    config, path = source.config, source.path
    name = path if Path(path).exists() else hub_id(path)
    sizes = (
        f"{config.num_hidden_layers} layers, {config.num_attention_heads} heads, width "
        f"{config.hidden_size}, {config.max_position_embeddings:,} positions, "
        f"{config.vocab_size:,} tokens, in {str(dtype).removeprefix('torch.')}."
    )
    compared = "The logits were not compared with the source's."
    if checked is not None:
        compared = (
            f"On random tokens, {checked} from the source's, computed by transformers' GPT-2."
        )
    write_card(
        folder,
        f"Converted from `{name_of(name)}` ({source.origin})",
        {
            "Data": WEBTEXT
            if source.digests
            else "Its source does not say what it was trained on.",
            "Sizes": sizes,
            "Evaluation": f"{compared} `hf-scratch-gpt eval FOLDER TEXT` measures perplexity.",
        },
        config,
        source=name,
        has_tokenizer=source.tokenizer is not None,
    )


def export(source: Path, out: Path, overwrite: bool = True) -> list[str]:
    """Write the model saved in the folder `source` to `out` in transformers' GPT-2 format.

    It loads with `GPT2LMHeadModel` and `AutoTokenizer`, without this package. `out`, as
    `files.destination` returns it, appears when all is written and its logits are the source's;
    `overwrite` lets it replace what is there by then.

    Returns:
        Lines that tell what was checked and written.

    Raises:
        ValueError: `source` is not a model of ours, or is damaged.
        RuntimeError: the logits differ.
    """
    config, stored = read_saved(source)
    planned = plan_export(stored, config)
    dtype = common_dtype(planned)
    with new_folder(out, overwrite) as complete:
        save_all_but_weights(GPT2LMHeadModel, gpt2_config(config), dtype, source, complete)
        files = other_vocabulary(source)
        for file in files:
            shutil.copy(file, complete)
        if not files and has_vocabulary(source):
            _save_tokenizer(source, complete)
        write_weights(complete, planned, dtype)
        checked = verify(read_hf_gpt2(str(complete)), source)
    return [f"checked  {checked}", f"wrote    {out}"]


def _save_tokenizer(source: Path, out: Path) -> None:
    """Save the vocabulary of `source` in `out` as GPT-2's."""
    with told_as_error(source):
        ours = ScratchGPTTokenizer.from_pretrained(source)
        theirs = GPT2TokenizerFast.from_pretrained(source)
    for name in _OUR_SETTINGS:
        theirs.init_kwargs.pop(name, None)
    theirs.save_pretrained(out)
    ours.save_vocabulary(out)
