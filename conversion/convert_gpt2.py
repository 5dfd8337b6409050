"""Convert a GPT-2 to a saved model: `python -m conversion.convert_gpt2 SOURCE OUT`.

SOURCE is a folder of OpenAI's release, a GPT-2 in transformers' format (a folder, a hub id, or
124M, 355M, 774M, 1558M for the official ones), or a checkpoint of nanoGPT, of the from-scratch
textbook or of llm.c. OUT holds weights, configuration, code and tokenizer, and loads wherever
transformers is installed.
"""

import argparse
import hashlib
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from hf_scratch_gpt import ScratchGPTForCausalLM, ScratchGPTTokenizer

from .assemble import assemble
from .hf_gpt2 import read_hf_gpt2
from .llmc import is_llmc, read_llmc
from .nanogpt import read_nanogpt
from .openai_release import read_openai_release
from .sources import GPT2Source, load_pickle
from .textbook import read_textbook
from .verify import verify

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
    content = load_pickle(source)
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
        opened.tokenizer = ScratchGPTTokenizer.from_pretrained(options.tokenizer)
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
        Lines that tell what was read, dropped and written.

    Raises:
        ValueError: a tensor is missing, left over, misshapen or not finite, or the logits differ.
    """
    tensors = assemble(source, dtype)
    with torch.device("meta"):
        model = ScratchGPTForCausalLM(source.config).to(next(iter(tensors.values())).dtype)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in out.parent.glob(f".{out.name}-*.unfinished"):
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        dir=out.parent, prefix=f".{out.name}-", suffix=".unfinished"
    ) as unfinished:
        complete = Path(unfinished) / out.name
        model.save_pretrained(complete, state_dict=tensors, max_shard_size=max_shard_size)
        tensors.clear()
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(complete)
        report = [
            f"read     {len(source.tensors)} tensors of {source.path} ({source.origin})",
            *(f"dropped  {name}: {reason}" for name, reason in source.dropped.items()),
        ]
        if source.tokenizer is None:
            report.append("no vocabulary: pass --tokenizer to save one with the model")
        if check:
            largest, mean = verify(source, complete)
            report.append(f"checked  logits differ by {largest:.2g} at most, {mean:.2g} on average")
        write_model_card(complete, source, parameters)
        if out.exists():
            out.rename(Path(unfinished) / "replaced")
        complete.rename(out)
    report.append(f"wrote    {parameters:,} parameters in {model.dtype} to {out}")
    return report


def write_model_card(folder: Path, source: GPT2Source, parameters: int) -> None:
    """Write README.md: where the model comes from, its sizes, its files' checksums."""
    config = source.config
    files = sorted(path for path in folder.iterdir() if path.is_file())
    digests = [f"| {path.name} | {path.stat().st_size:,} | `{_sha256(path)}` |" for path in files]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [gpt2, scratch_gpt]",
        "---",
        "",
        f"# GPT-2, {parameters:,} parameters",
        "",
        f"Converted from `{Path(source.path).name}` ({source.origin}) with hf_scratch_gpt. Load it "
        "with `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`.",
        "",
        f"{config.num_hidden_layers} layers, {config.num_attention_heads} heads, width "
        f"{config.hidden_size}, {config.max_position_embeddings} positions, {config.vocab_size:,} "
        "tokens.",
        "",
        "| File | Bytes | SHA-256 |",
        "| --- | ---: | --- |",
        *digests,
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


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
    out = Path(options.out)
    try:
        if out.exists() and not options.overwrite and (out.is_file() or any(out.iterdir())):
            raise ValueError(f"{out} exists already; choose another folder or pass --overwrite")
        dtype = getattr(torch, options.dtype) if options.dtype else None
        report = convert(
            open_source(options), out, dtype, options.max_shard_size, not options.no_verify
        )
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print("\n".join(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
