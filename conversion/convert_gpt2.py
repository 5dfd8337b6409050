"""Convert a GPT-2 to a saved model: `python -m conversion.convert_gpt2 SOURCE OUT`.

SOURCE is a folder of OpenAI's release, or a GPT-2 in transformers' format: a folder or a hub id.
OUT holds weights, configuration, code and tokenizer, and loads wherever transformers is installed.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from hf_scratch_gpt import ScratchGPTForCausalLM

from .hf_gpt2 import read_hf_gpt2
from .openai_release import is_openai_release, read_openai_release


def convert(
    source: str, out: str, dtype: str = "auto", overwrite: bool = False
) -> ScratchGPTForCausalLM:
    """Convert `source` and save it in the folder `out`.

    `out` appears all at once, when everything is written; a conversion that fails leaves it as it
    was.

    Args:
        source: a folder or hub id.
        out: the folder to write.
        dtype: data type to save in, such as "float32" or "bfloat16"; "auto" keeps the source's.
        overwrite: replace `out` if it is there and not empty.

    Returns:
        The converted model.

    Raises:
        ValueError: `out` is in the way, or `source` cannot be read; names file and tensor.
    """
    target = Path(out)
    if target.exists() and not overwrite and (target.is_file() or any(target.iterdir())):
        raise ValueError(f"{target} exists already; choose another folder or pass --overwrite")
    opened = read_openai_release(source) if is_openai_release(source) else read_hf_gpt2(source)
    model, report = ScratchGPTForCausalLM.from_pretrained(
        **opened.load_arguments, dtype=dtype, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report[problem]:
            raise ValueError(
                f"{source}: {problem.replace('_', ' ')}: {', '.join(map(str, report[problem]))}"
            )

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as unfinished:
        complete = Path(unfinished) / target.name
        model.save_pretrained(complete)
        if opened.tokenizer is not None:
            opened.tokenizer.save_pretrained(complete)
        if target.exists():
            target.rename(Path(unfinished) / "replaced")
        complete.rename(target)
    return model


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m conversion.convert_gpt2", description=__doc__)
    parser.add_argument(
        "source", help="folder of OpenAI's release, or folder or hub id of a transformers GPT-2"
    )
    parser.add_argument("out", help="folder to write")
    parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, ...; the source's by default"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    options = parser.parse_args(arguments)
    try:
        model = convert(options.source, options.out, options.dtype, options.overwrite)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {model.num_parameters():,} parameters, {model.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
