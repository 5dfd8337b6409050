"""Texts to packed blocks of tokens, and a GPT trained on them by transformers' `Trainer`."""

from .run import TrainingResult, train
from .setup import parse_flags

__all__ = ["TrainingResult", "parse_flags", "train"]
