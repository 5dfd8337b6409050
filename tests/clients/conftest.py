"""One GPT-2 in transformers' format, the same weights as a model of ours, and their reference."""

import os
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from hf_scratch_gpt import ScratchGPTForCausalLM

from ..models import random_gpt2

CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="session")
def gpt2_with_tokenizer(tmp_path_factory, tiny_tokenizer) -> Path:
    """A random GPT-2 that writes ASCII alone, so that a text tells which ids it was made of."""
    folder = tmp_path_factory.mktemp("clients") / "gpt2"
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 399)
    torch.manual_seed(1)
    model = random_gpt2(vocab_size=400, n_layer=2, **tokens)
    pieces = [tiny_tokenizer.decode([number]) for number in range(399)]
    with torch.no_grad():
        for number, piece in enumerate(pieces):
            if not (piece.isascii() and piece.isprintable()):
                model.transformer.wte.weight[number] = 0
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ours(tmp_path_factory, gpt2_with_tokenizer, tiny_tokenizer) -> Path:
    """The same weights as a folder of ours, with a template for chats."""
    folder = tmp_path_factory.mktemp("clients") / "ours"
    ScratchGPTForCausalLM.from_pretrained(gpt2_with_tokenizer).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


@pytest.fixture(scope="session")
def greedy(gpt2_with_tokenizer, tiny_tokenizer):
    """The text that GPT2LMHeadModel writes after a prompt by greedy search."""
    model = GPT2LMHeadModel.from_pretrained(gpt2_with_tokenizer)

    def write(prompt: str, tokens: int) -> str:
        ids = tiny_tokenizer(prompt, return_tensors="pt").input_ids
        written = model.generate(ids, max_new_tokens=tokens, do_sample=False)
        return tiny_tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)

    return write


@pytest.fixture(scope="session")
def record():
    """Note what a client was compared by: a row of the table in the file WORKS_WITH names."""
    rows: dict[tuple[str, str], str] = {}

    def note(package: str, compared: str, figure: str) -> None:
        rows[package, compared] = f"| {package} | {version(package)} | {compared} | {figure} |"

    yield note
    if place := os.environ.get("WORKS_WITH"):
        lines = Path(place).read_text().splitlines()
        first = lines.index("| --- | --- | --- | --- |") + 1
        after = next((i for i in range(first, len(lines)) if not lines[i].startswith("|")), None)
        for line in lines[first:after]:
            package, _, compared, _ = (cell.strip() for cell in line.strip("|").split("|"))
            rows.setdefault((package, compared), line)
        lines[first:after] = [rows[key] for key in sorted(rows)]
        Path(place).write_text("\n".join(lines) + "\n")
