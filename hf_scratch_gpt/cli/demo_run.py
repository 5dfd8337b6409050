"""A checkpoint of OpenAI's converted, and a GPT from nothing in two minutes, without a network."""

import shlex
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    set_seed,
)

from ..checkpoints.bundled import convert_bundled
from ..files import refuse_file
from ..messages import printable
from ..model.configuration_scratch_gpt import ScratchGPTConfig
from ..model.modeling_scratch_gpt import ScratchGPTForCausalLM
from ..training.bigram import bigram_loss
from ..training.blocks import Blocks
from ..training.callbacks import SampleText, draw_loss
from ..training.corpus import tokenize
from ..training.manual import read_texts, write_texts
from ..training.run import train
from ..training.run_folder import CURVE
from ..training.setup import check_installed
from ..training.vocabularies import make_vocabulary
from ..writing import write
from .progress import TerminalProgress

VOCABULARY = 384
# About 0.5M parameters. So small a model learns most in a given time by many small steps; two
# blocks, a head of its own and large first weights get further in them, and so does a learning rate
# that rises for a fifth of the steps and then falls in a line.
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    drop_rate=0.0,
    initializer_range=0.1,
)
STEPS = 1600
TRAINING: dict[str, Any] = dict(
    per_device_train_batch_size=4,
    per_device_eval_batch_size=64,
    learning_rate=4e-3,
    lr_scheduler_type="linear",
    warmup_steps=0.2,
    adam_beta2=0.98,
    max_steps=STEPS,
    eval_steps=STEPS // 10,
    save_steps=STEPS // 4,
    logging_steps=50,
)
VALIDATION = 0.02
_CONVERTED = "openai-tiny"  # the folder in which the bundled GPT-2 is converted, at first
PROMPT = "The for statement is used to"
SAMPLING: dict[str, Any] = dict(do_sample=True, temperature=0.5, top_k=40)

_CODE = """\
from transformers import pipeline
write = pipeline("text-generation", {folder!r}, trust_remote_code=True)
print(write({prompt!r}, max_new_tokens=40)[0]["generated_text"])"""


def run_demo(folder: Path, console: Console) -> bool:
    """Convert the bundled GPT-2, train a small GPT in `folder`, and let it write.

    Returns:
        Whether it came to its end; after Ctrl-C it goes on another time.

    Raises:
        ValueError: `folder` holds something else.
        ImportError: a package that training needs is missing.
    """
    check_installed()
    folder = folder.expanduser().resolve()
    difference = convert_bundled(_own(folder) / _CONVERTED)
    console.print(
        "A tiny GPT-2 in OpenAI's format is converted; its logits differ from those of OpenAI's "
        f"own code by {difference:.0e} at most"
    )
    files = write_texts(folder, VALIDATION)
    characters = sum(map(len, read_texts(files[0])))
    tokenizer = make_vocabulary(f"bpe:{VOCABULARY}", files[0], cache_dir=folder / "tokens")
    training, validation = (_blocks(file, tokenizer, folder) for file in files)
    console.print(
        f"Python's manual and the docstrings of its library: {characters:,} characters, "
        f"{training.file.tokens:,} tokens of a vocabulary of {len(tokenizer):,}"
    )
    bigram = bigram_loss(training, validation, VOCABULARY)
    if not _train(folder, files, tokenizer, bigram, console):
        return False
    _show_writing(folder / "model", console)
    _show_what_is_next(folder, console)
    return True


def _own(folder: Path) -> Path:
    """`folder`, if it is new, empty or that of a demonstration; else a ValueError."""
    refuse_file(folder)
    is_known = not folder.exists() or (folder / _CONVERTED).is_dir()
    if not is_known and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"{folder} holds files of others; choose another folder for --out")
    return folder


def _blocks(file: Path, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Blocks:
    tokens = tokenize(file, tokenizer, cache_dir=folder / "tokens")
    return Blocks(tokens, SIZES["max_position_embeddings"])


def _train(
    folder: Path,
    files: tuple[Path, Path],
    tokenizer: PreTrainedTokenizerBase,
    bigram: float,
    console: Console,
) -> bool:
    """Train, or go on with it; whether it came to its end."""
    config, model_folder = ScratchGPTConfig(**SIZES), folder / "model"

    def show(step: int, text: str) -> None:
        if step < STEPS:  # the last one is that of the model loaded again
            console.print(
                f"After {step} steps it writes:\n{printable(' '.join(text.split()))}",
                soft_wrap=True,
            )

    console.print(f"The best bigram model has a loss of {bigram:.3f} nats per token")
    set_seed(0)
    fresh = ScratchGPTForCausalLM(config).eval()
    show(0, PROMPT + write(fresh, tokenizer, PROMPT, 20, **SAMPLING))
    torch.set_num_threads(1)  # for matrices as small as these, more gain little
    samples = SampleText(tokenizer, PROMPT, STEPS // 2, show, **SAMPLING)
    result = train(
        files[0],
        model_folder,
        model=config,
        tokenizer=tokenizer,
        validation=files[1],
        cache_dir=folder / "tokens",
        progress=TerminalProgress(console),
        callbacks=[samples],
        **TRAINING,
    )
    if result.interrupted:
        console.print("Stopped; the same command goes on from here")
        return False
    if result.went_on_from == result.steps:
        console.print(f"It was trained before; delete {folder} to see it again", soft_wrap=True)
    draw_loss(result.history, model_folder / CURVE, bigram)
    loss = result.last("eval_loss")
    console.print(
        f"Validation loss {loss:.3f} nats per token; {bigram:.3f} for the best bigram model"
    )
    return True


def _show_writing(folder: Path, console: Console) -> None:
    """Load the model in `folder` as any program would, and let it write."""
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    show = partial(console.out, end="", highlight=False)
    console.rule("Loaded again, it writes")
    show(PROMPT)
    write(model, tokenizer, PROMPT, 150, show, **SAMPLING)
    console.out("")


def _show_what_is_next(folder: Path, console: Console) -> None:
    """Where everything is, and commands to paste."""
    model = folder / "model"
    console.rule("Try next")
    console.print(f"The curve is {model / CURVE}; the model is in {model}\n", soft_wrap=True)
    for arguments in (
        ["generate", model, PROMPT],
        ["inspect", model, PROMPT, "--html", folder / "page.html"],
        ["info", model, "gpt2"],
        ["train", folder / "training.jsonl", "--output-dir", folder / "own", "--init-from", model],
    ):
        console.out(shlex.join([*_this_command(), *map(str, arguments)]), highlight=False)
    console.print("\nOr from Python, anywhere:\n")
    console.out(_CODE.format(folder=str(model), prompt=PROMPT), highlight=False)


def _this_command() -> list[str]:
    """How a shell calls this command line."""
    name, python = "hf-scratch-gpt", Path(sys.executable)
    found = shutil.which(name)
    is_active = found is not None and Path(found).parent == python.parent
    return [name] if is_active else [sys.executable, "-m", "hf_scratch_gpt"]
