"""Save a model in transformers' GPT-2 format: `python -m conversion.export_gpt2 --help`."""

import sys

from hf_scratch_gpt.cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
