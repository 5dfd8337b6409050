"""The command line, `hf-scratch-gpt`. It reads arguments, calls the other wings and prints."""

from .app import main

__all__ = ["main"]
