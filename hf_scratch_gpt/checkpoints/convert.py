"""Convert a GPT-2 to a saved model: `python -m conversion.convert_gpt2 SOURCE OUT`.

SOURCE is a folder of OpenAI's release, a GPT-2 in transformers' format (a folder, a hub id, or
124M, 355M, 774M, 1558M for the official ones), or a checkpoint of nanoGPT, of the from-scratch
textbook or of llm.c. OUT holds weights, configuration, code and tokenizer, and loads wherever
transformers is installed.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ..files import destination, new_folder, without_progress_bars
from ..model.modeling_scratch_gpt import ScratchGPTForCausalLM
from ..model.tokenization_scratch_gpt import ScratchGPTTokenizer
from .assemble import common_dtype, num_parameters, plan
from .commands import run_command
from .digests import sha256
from .hf_gpt2 import OFFICIAL, read_hf_gpt2
from .llmc import is_llmc, read_llmc
from .nanogpt import read_nanogpt
from .openai_release import read_openai_release
from .saved import read_generation_config
from .sources import GPT2Source, load_pickle
from .textbook import read_textbook
from .verify import verify
from .weights import write_weights

FORMATS = ("openai", "hf", "nanogpt", "textbook", "llmc")


def recognize(source: str) -> str:
    """The format of `source`, one of `FORMATS`.

    Raises:
        ValueError: it is none of them.
    """
    path = Path(source)
    if path.is_dir():
        marks = {"hparams.json": "openai", "config.json": "hf", "ckpt.pt": "nanogpt"}
        for name, kind in marks.items():
            if (path / name).is_file():
                return kind
        raise ValueError(f"{source} is no GPT-2: it has none of {', '.join(marks)}")
    if not path.is_file():
        return "hf"
    if is_llmc(source):
        return "llmc"
    content = load_pickle(source, check=False)
    if isinstance(content, dict) and "model_args" in content:
        return "nanogpt"
    return "textbook"


def open_source(options: argparse.Namespace) -> GPT2Source:
    """Open the source that the command line names."""
    kind = options.format or recognize(options.source)
    if kind == "textbook":
        opened = read_textbook(options.source, options.num_heads, options.preset)
    else:
        readers = {
            "openai": read_openai_release,
            "hf": read_hf_gpt2,
            "nanogpt": read_nanogpt,
            "llmc": read_llmc,
        }
        opened = readers[kind](options.source)
    if options.tokenizer is not None:
        opened.adopt(ScratchGPTTokenizer.from_pretrained(options.tokenizer))
    if opened.tokenizer is not None and len(opened.tokenizer) > opened.config.vocab_size:
        raise ValueError(
            f"the vocabulary has {len(opened.tokenizer)} tokens, and the model of {options.source} "
            f"{opened.config.vocab_size}; pass the tokenizer that it was trained with"
        )
    return opened


def convert(
    source: GPT2Source,
    out: Path,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "50GB",
    check: bool = True,
) -> list[str]:
    """Convert `source` and save it in the folder `out`, which is replaced if it is there.

    `out` appears all at once, when all is written and compared with the source; a conversion
    that fails or is killed leaves it as it was.

    Args:
        source: opened by its reader.
        out: the folder to write.
        dtype: what to save in; None keeps the source's.
        max_shard_size: largest size of one weight file.
        check: compare the logits of the result with the source's.

    Returns:
        Lines that tell what was read, dropped, checked and written.

    Raises:
        ValueError: a tensor is missing, left over, misshapen or not finite, or the logits differ.
    """
    pieces = plan(source)
    dtype = dtype or common_dtype(pieces)
    with new_folder(out) as complete:
        save_all_but_weights(source, dtype, complete)
        digests = write_weights(complete, pieces, dtype, max_shard_size)
        report = list(_read_and_dropped(source))
        if check:
            largest, mean = verify(source, complete)
            report.append(f"checked  logits differ by {largest:.2g} at most, {mean:.2g} on average")
        parameters = num_parameters(pieces)
        write_model_card(complete, source, dtype, parameters, digests)
    report.append(f"wrote    {parameters:,} parameters in {dtype} to {out}")
    return report


def save_all_but_weights(source: GPT2Source, dtype: torch.dtype, folder: Path) -> None:
    """Write configurations, code and vocabulary to `folder`."""
    with torch.device("meta"):
        model = ScratchGPTForCausalLM(source.config).to(dtype)
    generation_config = read_generation_config(Path(source.path), source.config)
    if generation_config is not None:
        model.generation_config = generation_config
    with without_progress_bars():  # they would count no weights
        model.save_pretrained(folder, state_dict={})
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(folder)


def _read_and_dropped(source: GPT2Source) -> Iterator[str]:
    yield f"read     {len(source.tensors)} tensors of {source.path} ({source.origin})"
    for reason in dict.fromkeys(source.dropped.values()):
        names = [name for name, why in source.dropped.items() if why == reason]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"dropped  {names[0]}{more}: {reason}"
    for file in source.unchecked:
        yield (
            f"trusted  {file} has no checksum; one beside it, as `sha256sum FILE > SHA256SUMS` "
            "writes it, would show a damaged bit"
        )
    if source.tokenizer is None:
        yield "lacks    a vocabulary; --tokenizer saves one with the model"


def write_model_card(
    folder: Path, source: GPT2Source, dtype: torch.dtype, parameters: int, digests: dict[str, str]
) -> None:
    """Write README.md: where the model comes from, its sizes, its files' SHA-256.

    Args:
        digests: those that are known already, by file name.
    """
    config = source.config
    rows = []
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest = digests.get(path.name) or sha256(path)
        rows.append(f"| {path.name} | {path.stat().st_size:,} | `{digest}` |")
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [gpt2, scratch_gpt]",
        "---",
        "",
        f"# GPT-2, {parameters:,} parameters",
        "",
        f"Converted from `{_name(source.path)}` ({source.origin}) with hf_scratch_gpt. Load it "
        "with `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`.",
        "",
        f"{config.num_hidden_layers} layers, {config.num_attention_heads} heads, width "
        f"{config.hidden_size}, {config.max_position_embeddings} positions, {config.vocab_size:,} "
        f"tokens, in {str(dtype).removeprefix('torch.')}.",
        "",
        "| File | Bytes | SHA-256 |",
        "| --- | ---: | --- |",
        *rows,
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _name(source: str) -> str:
    """The name to give to the file, folder or hub id `source` wherever the result goes."""
    path = Path(source)
    return path.resolve().name if path.exists() else OFFICIAL.get(source, source)


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that say which model to read, and how."""
    parser.add_argument("source", help="folder, file, hub id, or 124M, 355M, 774M, 1558M")
    parser.add_argument("--format", choices=FORMATS, help="recognised if not given")
    parser.add_argument("--tokenizer", help="folder with the vocabulary, if SOURCE has none")
    parser.add_argument("--num-heads", type=int, help="attention heads of a textbook model")
    parser.add_argument("--preset", help="published size of a textbook model, such as gpt2-medium")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m conversion.convert_gpt2", description=__doc__)
    add_source_arguments(parser)
    parser.add_argument("out", help="folder to write")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="the source's if not given")
    parser.add_argument("--max-shard-size", default="50GB", help="largest weight file (50GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    parser.add_argument("--no-verify", action="store_true", help="do not compare logits")
    options = parser.parse_args(arguments)
    return run_command(lambda: _convert(options))


def _convert(options: argparse.Namespace) -> None:
    sources = [source for source in (options.source, options.tokenizer) if source]
    out = destination(options.out, options.overwrite, sources)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    source = open_source(options)
    report = convert(source, out, dtype, options.max_shard_size, not options.no_verify)
    print("\n".join(report))


if __name__ == "__main__":
    sys.exit(main())
