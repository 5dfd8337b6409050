"""Convert a GPT-2 of any dress to a saved model: `python -m conversion.convert_gpt2 --help`."""

import sys

from hf_scratch_gpt.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
