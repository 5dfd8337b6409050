"""The commands that convert, export and verify; only here does this wing print."""

import argparse
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from ..files import destination
from .assemble import plan
from .convert import convert
from .export import export
from .readers import FORMATS, open_source
from .sources import GPT2Source
from .verify import verify


def convert_command(arguments: list[str] | None = None) -> int:
    """Convert a GPT-2 of any format to a saved model; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion.convert_gpt2",
        description="Convert a GPT-2 to a saved model: OpenAI's release, transformers' format, or "
        "a checkpoint of nanoGPT, of the from-scratch textbook or of llm.c.",
    )
    _add_source_arguments(parser)
    parser.add_argument("out", help="folder to write")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="the source's if not given")
    parser.add_argument("--max-shard-size", default="50GB", help="largest weight file (50GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    parser.add_argument("--no-verify", action="store_true", help="do not compare logits")
    options = parser.parse_args(arguments)

    def work() -> list[str]:
        sources = [source for source in (options.source, options.tokenizer) if source]
        out = destination(options.out, options.overwrite, sources)
        dtype = getattr(torch, options.dtype) if options.dtype else None
        source = _open_source(options)
        return convert(source, out, dtype, options.max_shard_size, not options.no_verify)

    return _run(work)


def export_command(arguments: list[str] | None = None) -> int:
    """Save a model in transformers' GPT-2 format; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion.export_gpt2",
        description="Save a model in transformers' GPT-2 format, which loads without this package.",
    )
    parser.add_argument("source", help="folder of a saved model")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    options = parser.parse_args(arguments)

    def work() -> list[str]:
        out = destination(options.out, options.overwrite, [options.source])
        return export(Path(options.source), out)

    return _run(work)


def verify_command(arguments: list[str] | None = None) -> int:
    """Compare a saved model with the GPT-2 that it was made of; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion.verify",
        description="Compare a saved model with the GPT-2 that it was made of: both compute the "
        "logits of the same random tokens, the source by transformers' own code.",
    )
    _add_source_arguments(parser)
    parser.add_argument("out", help="the saved model")
    options = parser.parse_args(arguments)

    def work() -> list[str]:
        source = _open_source(options)
        plan(source)  # tells what is missing or misshapen
        largest, mean = verify(source, Path(options.out))
        return [f"logits differ by {largest:.3g} at most, by {mean:.3g} on average"]

    return _run(work)


def _add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that say which model to read, and how."""
    parser.add_argument("source", help="folder, file, hub id, or 124M, 355M, 774M, 1558M")
    parser.add_argument("--format", choices=FORMATS, help="recognised if not given")
    parser.add_argument("--tokenizer", help="folder with the vocabulary, if SOURCE has none")
    parser.add_argument("--num-heads", type=int, help="attention heads of a textbook model")
    parser.add_argument("--preset", help="published size of a textbook model, such as gpt2-medium")


def _open_source(options: argparse.Namespace) -> GPT2Source:
    textbook = dict(num_heads=options.num_heads, preset=options.preset)
    return open_source(options.source, options.format, options.tokenizer, **textbook)


def _run(work: Callable[[], list[str]]) -> int:
    """Print the report of `work`; return an exit code, 1 after an error told in one line."""
    # SIGTERM does what Ctrl-C does, so that what is unfinished is removed.
    in_main_thread = threading.current_thread() is threading.main_thread()  # others get no signals
    before = in_main_thread and signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print("\n".join(work()))
        return 0
    except (OSError, ValueError) as error:
        print(f"error: {_printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was changed", file=sys.stderr)
        return 130
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


def _printable(text: str) -> str:
    """`text` with what would steer a terminal written as escapes; names come from files."""
    escaped = (sign.encode("unicode_escape").decode() for sign in text)
    return "".join(a if a.isprintable() else b for a, b in zip(text, escaped, strict=True))
