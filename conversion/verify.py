"""Compare a saved model with the GPT-2 it was made of: `python -m conversion.verify --help`."""

import sys

from hf_scratch_gpt.checkpoints.commands import verify_command as main

if __name__ == "__main__":
    sys.exit(main())
