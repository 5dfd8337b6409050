"""The commands that convert, export and verify; only here does this wing print."""

import argparse
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from ..files import destination
from ..messages import TOLD, one_line, printable
from .assemble import plan
from .convert import convert, export
from .hf_gpt2 import OFFICIAL
from .readers import FORMATS, open_source
from .sources import GPT2Source
from .state_dicts import ACTIVATIONS
from .verify import verify


def convert_command(
    arguments: list[str] | None = None, name: str = "python -m conversion.convert_gpt2"
) -> int:
    """Convert a GPT-2 of any format to a saved model; return the exit code."""
    parser = _parser(name, "Convert a GPT-2 of any format to a saved model.")
    _add_source(parser)
    _add_out(parser)
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="the source's if not given")
    parser.add_argument("--max-shard-size", default="50GB", help="largest weight file (50GB)")
    parser.add_argument("--no-verify", action="store_true", help="do not compare logits")
    return _run(_convert, parser.parse_args(arguments))


def _convert(options: argparse.Namespace) -> list[str]:
    sources = [source for source in (options.source, options.tokenizer) if source]
    out = destination(options.out, options.overwrite, sources)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    size, check = options.max_shard_size, not options.no_verify
    return convert(_open(options), out, dtype, size, check, options.overwrite)


def export_command(
    arguments: list[str] | None = None, name: str = "python -m conversion.export_gpt2"
) -> int:
    """Save a model in transformers' GPT-2 format; return the exit code."""
    parser = _parser(name, "Save a model as GPT-2, which loads without this package.")
    parser.add_argument("source", help="folder of a saved model")
    _add_out(parser)
    return _run(_export, parser.parse_args(arguments))


def _export(options: argparse.Namespace) -> list[str]:
    out = destination(options.out, options.overwrite, [options.source])
    return export(Path(options.source), out, options.overwrite)


def verify_command(
    arguments: list[str] | None = None, name: str = "python -m conversion.verify"
) -> int:
    """Compare a saved model with the GPT-2 that it was made of; return the exit code."""
    parser = _parser(name, "Compare a saved model's logits with those of transformers' GPT-2.")
    _add_source(parser)
    parser.add_argument("out", help="the saved model")
    return _run(_verify, parser.parse_args(arguments))


def _verify(options: argparse.Namespace) -> list[str]:
    source = _open(options)
    plan(source)  # tells what is missing or misshapen
    return [verify(source, Path(options.out))]


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(name, description=description)


def _add_source(parser: argparse.ArgumentParser) -> None:
    """Arguments that say which model to read, and how."""
    parser.add_argument("source", help=f"folder, file, hub id, or {', '.join(OFFICIAL)}")
    parser.add_argument("--format", choices=FORMATS, help="recognised if not given")
    parser.add_argument("--tokenizer", help="folder with the vocabulary, if SOURCE has none")
    parser.add_argument("--num-heads", type=int, help="attention heads, of weights alone")
    parser.add_argument("--preset", help="published size of weights alone, such as gpt2-medium")
    about = "form of GELU, of nanoGPT or weights alone; the report says what is taken if not given"
    parser.add_argument("--activation", choices=ACTIVATIONS, help=about)


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")


def _open(options: argparse.Namespace) -> GPT2Source:
    names = ("num_heads", "preset", "activation")
    chosen = {name: getattr(options, name) for name in names}
    return open_source(options.source, options.format, options.tokenizer, **chosen)


def _run(work: Callable[[argparse.Namespace], list[str]], options: argparse.Namespace) -> int:
    """Print the report of `work`; return an exit code, 1 after an error told in one line."""
    # SIGTERM does what Ctrl-C does, so that what is unfinished is removed.
    in_main_thread = threading.current_thread() is threading.main_thread()  # others get no signals
    before = in_main_thread and signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print("\n".join(map(printable, work(options))))
        return 0
    except TOLD as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was changed", file=sys.stderr)
        return 130
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)
