"""`python -m hf_scratch_gpt` is the command `hf-scratch-gpt`."""

from .cli import main

if __name__ == "__main__":
    main()
