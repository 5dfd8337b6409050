"""Texts to packed blocks of tokens, and a GPT trained on them by transformers' `Trainer`."""

from .corpus import clear_cache
from .run import TrainingResult, train
from .setup import parse_flags

__all__ = ["TrainingResult", "clear_cache", "parse_flags", "train"]
