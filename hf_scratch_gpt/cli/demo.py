"""A GPT from nothing in two minutes: a vocabulary, a training, a text, without a network.

The text is the English manual that comes with Python (`pydoc_data.topics`), what `help("for")`
prints.
"""

import json
import random
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from rich.console import Console
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline, set_seed

from ..model.configuration_scratch_gpt import ScratchGPTConfig
from ..model.tokenization_scratch_gpt import ScratchGPTTokenizer
from ..model.vocabulary_scratch_gpt import END_OF_TEXT
from ..training.corpus import Blocks, tokenize
from ..training.run import train
from ..writing import write
from .progress import TerminalProgress

VOCABULARY = 1024
# About 0.5M parameters: what two cores train well in less than a minute.
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    drop_rate=0.0,
    initializer_range=0.06,  # GPT-2's 0.02 is for wide models; narrow ones learn slowly from it
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
    write_manual(manual)
    console.print(
        f"Python's manual: {len(topics)} topics, {sum(map(len, topics.values())):,} characters"
    )
    tokenizer = make_tokenizer(folder / "tokenizer")
    tokens = tokenize(manual, tokenizer, cache_dir=folder / "tokens")
    console.print(f"A vocabulary of {len(tokenizer):,} tokens makes {tokens.tokens:,} tokens of it")
    training, validation = Blocks(tokens, SIZES["max_position_embeddings"]).split(VALIDATION)
    pairs = bigram_loss(rows_of(training), rows_of(validation), VOCABULARY)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices so small gain little by more, and lose on a busy machine
    try:
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
    finally:
        torch.set_num_threads(threads)
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


def run_weights(source: str, folder: Path, console: Console) -> None:
    """Convert the GPT-2 `source` into `folder` and let it write.

    Raises:
        ValueError: this is no clone of the repository, or the conversion failed.
    """
    root = Path(__file__).parent.parent
    if not (root / "conversion" / "convert_gpt2.py").is_file():
        raise ValueError(
            "weights are converted by scripts that are in a clone of the repository alone; run "
            "this from one, or load a GPT-2 in transformers' format with "
            "ScratchGPTForCausalLM.from_pretrained"
        )
    place = str(Path(source).resolve()) if Path(source).exists() else source
    command = [sys.executable, "-m", "conversion.convert_gpt2", place, str(folder.resolve())]
    done = subprocess.run([*command, "--overwrite"], cwd=root, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise ValueError(f"{source} was not converted: {lines[-1].removeprefix('error: ')}")
    show_writing(folder, "Hello, my name is", console)


def show_writing(folder: Path, prompt: str, console: Console) -> None:
    """Load the model in `folder` as any program would, let it write, say how to use it."""
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    writer = pipeline(
        "text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(folder)
    )
    console.rule("It writes")
    console.out(prompt, end="", highlight=False)
    write(
        writer.model,
        writer.tokenizer,
        prompt,
        120,
        lambda text: console.out(text, end="", highlight=False),
        do_sample=True,
        temperature=0.8,
        top_k=40,
    )
    console.out("")
    console.rule(f"It is in {folder}; use it from anywhere")
    console.out(_CODE.format(folder=str(folder), prompt=prompt), highlight=False)


def write_manual(path: Path) -> None:
    """Write Python's manual to `path` as JSON lines, a topic a line, in an order of chance."""
    texts = [text for _, text in sorted(topics.items())]
    # The last ones are for validation, and neighbours in the alphabet are often alike.
    random.Random(0).shuffle(texts)
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


def make_tokenizer(folder: Path) -> ScratchGPTTokenizer:
    """Train a byte-level BPE vocabulary on the manual and save it in `folder`."""
    trained = ByteLevelBPETokenizer()
    texts = [text for _, text in sorted(topics.items())]
    trained.train_from_iterator(
        texts, vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], show_progress=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = ScratchGPTTokenizer(*trained.save_model(str(folder)))
    tokenizer.save_pretrained(folder)
    return tokenizer


def rows_of(blocks: Blocks) -> np.ndarray:
    """The token ids of `blocks`, (blocks, block size)."""
    size = blocks.block_size
    return blocks.file.ids()[blocks.start * size : blocks.stop * size].reshape(-1, size)


def bigram_loss(training: np.ndarray, validation: np.ndarray, vocabulary: int) -> float:
    """What the best bigram model of `training` loses on `validation`, in nats per token.

    It knows how often each token follows each other one, and leans on how frequent a token is
    where pairs are rare: p(b|a) = (n(ab) + m p(b)) / (n(a) + m), the hierarchical Dirichlet model
    of MacKay & Peto 1995. The weight m is the one of eight that is best on `validation`, which
    flatters it.

    Args:
        training, validation: token ids, (N, T) and (M, T); as in the GPT, the first of each row is
            given and not predicted.
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
