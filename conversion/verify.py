"""Compare a saved model with the GPT-2 it was made of: `python -m conversion.verify --help`."""

import sys

from hf_scratch_gpt.cli import main

if __name__ == "__main__":
    main(["verify", *sys.argv[1:]])
