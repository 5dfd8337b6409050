"""A GPT from nothing in two minutes: a vocabulary, a training, a text, without a network.

The text is the English manual that comes with Python (`pydoc_data.topics`), from which
`help("for")` prints.
"""

import json
import random
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from rich.console import Console
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from ..model.configuration_scratch_gpt import ScratchGPTConfig
from ..model.tokenization_scratch_gpt import ScratchGPTTokenizer
from ..model.vocabulary_scratch_gpt import END_OF_TEXT
from ..training.blocks import Blocks
from ..training.corpus import tokenize
from ..training.run import train
from ..writing import write
from .progress import TerminalProgress

TEXTS = [text for _, text in sorted(topics.items())]
# The last ones are for validation, and neighbours in the alphabet are often alike.
random.Random(0).shuffle(TEXTS)
VOCABULARY = 1024
# About 0.5M parameters, which two cores train in less than a minute.
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    drop_rate=0.0,
    initializer_range=0.06,  # GPT-2's 0.02 is for wide models; narrow ones learn slowly with it
)
TRAINING: dict[str, Any] = dict(
    per_device_train_batch_size=8,
    per_device_eval_batch_size=32,
    learning_rate=5e-3,
    max_steps=700,
    eval_steps=350,
    save_steps=700,
    logging_steps=30,
)
VALIDATION = 0.1
PROMPT = "The for statement is used to"

_CODE = """\
from transformers import pipeline
write = pipeline("text-generation", {folder!r}, trust_remote_code=True)
print(write({prompt!r}, max_new_tokens=100)[0]["generated_text"])"""


def run_demo(folder: Path, console: Console) -> None:
    """Train a small GPT on Python's manual in `folder`, and let it write.

    Raises:
        ValueError: `folder` holds something else.
    """
    manual, model_folder = folder / "manual.jsonl", folder / "model"
    folder.mkdir(parents=True, exist_ok=True)
    manual.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    console.print(f"Python's manual: {len(TEXTS)} topics, {sum(map(len, TEXTS)):,} characters")
    tokenizer = make_tokenizer(folder / "tokenizer")
    tokens = tokenize(manual, tokenizer, cache_dir=folder / "tokens")
    console.print(f"A vocabulary of {len(tokenizer):,} tokens makes {tokens.tokens:,} tokens of it")
    parts = Blocks(tokens, SIZES["max_position_embeddings"]).split(VALIDATION)
    training, validation = (
        np.stack([part[i]["input_ids"] for i in range(len(part))]) for part in parts
    )
    pairs = bigram_loss(training, validation, VOCABULARY)
    torch.set_num_threads(1)  # for matrices as small as these, more gain little
    result = train(
        manual,
        model_folder,
        model=ScratchGPTConfig(**SIZES),
        tokenizer=tokenizer,
        validation=VALIDATION,
        cache_dir=folder / "tokens",
        progress=TerminalProgress(console),
        **TRAINING,
    )
    if result.interrupted:
        console.print("Stopped; the same command goes on from here")
        return
    if result.went_on_from == result.steps:
        console.print(f"It was trained before; delete {folder} to see it again")
    loss = result.last("eval_loss")
    console.print(
        f"Validation loss {loss:.3f} nats per token; {pairs:.3f} for the best bigram model of the "
        "same tokens"
    )
    show_writing(model_folder, PROMPT, console)


def show_writing(folder: Path, prompt: str, console: Console) -> None:
    """Load the model in `folder` as any program would, let it write, say how to use it."""
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    show = partial(console.out, end="", highlight=False)
    console.rule("It writes")
    show(prompt)
    write(model, tokenizer, prompt, 120, show, do_sample=True, temperature=0.8, top_k=40)
    console.out("")
    console.rule(f"It is in {folder}; use it from anywhere")
    console.out(_CODE.format(folder=str(folder), prompt=prompt), highlight=False)


def make_tokenizer(folder: Path) -> ScratchGPTTokenizer:
    """Train a byte-level BPE vocabulary on the manual and save it in `folder`."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        TEXTS, vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], show_progress=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = ScratchGPTTokenizer(*trained.save_model(str(folder)))
    tokenizer.save_pretrained(folder)
    return tokenizer


def bigram_loss(training: np.ndarray, validation: np.ndarray, vocabulary: int) -> float:
    """The loss on `validation` of the best bigram model of `training`, in nats per token.

    p(b|a) = (n(ab) + m p(b)) / (n(a) + m), the hierarchical Dirichlet model of MacKay & Peto 1995,
    with the weight m of eight that is best on `validation`, which favours it.

    Args:
        training, validation: token ids, (N, T) and (M, T); the first of each row is given.
        vocabulary: number of ids, V.
    """
    pairs = np.zeros((vocabulary, vocabulary), dtype=np.int64)
    np.add.at(pairs, (training[:, :-1], training[:, 1:]), 1)
    frequency = np.bincount(training.ravel(), minlength=vocabulary) + 1.0
    frequency /= frequency.sum()
    before, after = validation[:, :-1], validation[:, 1:]
    followed = pairs.sum(axis=1)
    losses = [
        -np.log((pairs[before, after] + m * frequency[after]) / (followed[before] + m)).mean()
        for m in (1, 2, 5, 10, 20, 50, 100, 200)
    ]
    return float(min(losses))
