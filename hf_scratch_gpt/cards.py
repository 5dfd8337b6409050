"""The card of a saved model, its README.md: how to use it, where it is from, what its files are.

Its head is metadata for the Hub (huggingface.co/docs/hub/model-cards).
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from transformers import PretrainedConfig

from .files import sha256
from .model.configuration_scratch_gpt import VERSION, ScratchGPTConfig

_LARGEST = 1 << 20  # bytes of a card to read
_LONGEST = 200  # characters of a value to take
# What is taken from the card of a model that another one is made of.
_STATED = ("license", "license_name", "license_link", "language", "datasets")
# github.com/openai/gpt-2: LICENSE and model_card.md.
_OPENAI, _OPENAI_STATED = "openai-community/gpt2", {"license": "mit", "language": "en"}
WEBTEXT = (
    "WebText: 40 GB of text of 8 million pages that Reddit linked to before December 2017 (Radford "
    "et al. 2019, section 2.1). OpenAI has not published it."
)
_TOKENS = 20  # to write, in the card's example
_PROMPT_TOKENS = 8  # what its prompt takes at most

_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

place = "."  # this folder; anywhere else its path, or owner/name on the Hub
model = AutoModelForCausalLM.from_pretrained(place{trust})
tokenizer = AutoTokenizer.from_pretrained(place{trust})
prompt = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens={tokens})[0]))
```"""
_USE_IDS = """\
It has no vocabulary of GPT-2's kind with it, so this takes ids of tokens.

```python
import torch
from transformers import AutoModelForCausalLM

place = "."  # this folder; anywhere else its path, or owner/name on the Hub
model = AutoModelForCausalLM.from_pretrained(place{trust})
print(model.generate(torch.tensor([[0]]), max_new_tokens={tokens}))
```"""
_TRUST, _TRUSTED = (
    ", trust_remote_code=True",
    """

`trust_remote_code=True` runs the Python files of this folder. Where the package hf_scratch_gpt is
installed, `import hf_scratch_gpt` does in place of it.""",
)
_USE_ADAPTER = """\
An adapter is added to the model that it was trained for, `{base}`.

```python
import hf_scratch_gpt
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

place = "."  # this folder; anywhere else its path, or owner/name on the Hub
model = AutoPeftModelForCausalLM.from_pretrained(place)
tokenizer = AutoTokenizer.from_pretrained(place)
prompt = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens={tokens})[0]))
```"""
_LIMITATIONS = """\
It writes what is likely to follow, not what is true, and it repeats what is one-sided or harmful
in its data. Nothing has taught it to answer, to follow instructions, or to refuse. It reads
{positions:,} tokens at most, the prompt and what it writes taken together."""


def write_card(
    folder: Path,
    made: str,
    sections: Mapping[str, str],
    config: PretrainedConfig,
    source: str | None = None,
    has_tokenizer: bool = True,
) -> None:
    """Write the card of the model or adapter in `folder`, which is complete but for it.

    Args:
        made: a sentence that says how it was made.
        sections: what else the maker knows, by headings.
        config: the model's.
        source: the model that it is made of, a folder, file or hub id; None if of none.
        has_tokenizer: whether `AutoTokenizer` loads one from the folder.
    """
    is_adapter, kind = (folder / "adapter_config.json").is_file(), config.model_type
    count = parameters_in(folder)
    stated = {} if source is None else stated_by(source)
    data = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", kind] if kind == ScratchGPTConfig.model_type else [kind],
        base_model=None if source is None or Path(source).exists() else source,
        **stated,
    )
    example = _USE_ADAPTER if is_adapter else _USE if has_tokenizer else _USE_IDS
    brings_code = any(folder.glob("modeling_*.py"))
    tokens = max(1, min(_TOKENS, config.max_position_embeddings - _PROMPT_TOKENS))
    use = example.format(
        tokens=tokens, base=source and name_of(source), trust=_TRUST if brings_code else ""
    )
    parts = {
        "Use": use + (_TRUSTED if brings_code else ""),
        **sections,
        "Licence": _licence(source, stated),
        "Limitations": _LIMITATIONS.format(positions=config.max_position_embeddings),
        "Files": _files(folder),
    }
    title = f"{'An adapter' if is_adapter else 'A GPT'} of {count:,} parameters"
    made = f"{made} by hf_scratch_gpt {VERSION}."
    text = "\n\n".join([f"# {title}", made, *(f"## {name}\n\n{parts[name]}" for name in parts)])
    (folder / constants.REPOCARD_NAME).write_text(
        f"---\n{data.to_yaml()}\n---\n\n{text}\n", encoding="utf-8"
    )


def name_of(source: str) -> str:
    """The name of a file or folder without the way to it; a hub id as it is."""
    path = Path(source)
    return path.resolve().name if path.exists() else source


def stated_by(source: str) -> dict[str, Any]:
    """What the card of the model `source`, a folder or hub id, says of licence, language and data.

    The card of a hub id is read where it is in Hugging Face's cache. A card that cannot be read
    says nothing.
    """
    path: Any = Path(source, constants.REPOCARD_NAME)
    if not Path(source).exists():
        with suppress(HFValidationError):
            path = try_to_load_from_cache(source, constants.REPOCARD_NAME)
    is_openai = source.startswith(_OPENAI) and not Path(source).exists()
    stated: dict[str, Any] = dict(_OPENAI_STATED) if is_openai else {}
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return stated
    if Path(path).stat().st_size > _LARGEST:
        return stated
    with suppress(Exception):  # YAML's errors and those of the Hub's client have no class in common
        data = ModelCard.load(path, ignore_metadata_errors=True).data
        stated |= {name: data.get(name) for name in _STATED if _is_plain(data.get(name))}
    return stated


def _is_plain(value: Any) -> bool:
    """Whether a card's value is a short text, or a list of some."""
    values = value if isinstance(value, list) else [value]
    fits = (isinstance(each, str) and 0 < len(each) < _LONGEST for each in values[:_LONGEST])
    return 0 < len(values) < _LONGEST and all(fits)


def _licence(source: str | None, stated: Mapping[str, Any]) -> str:
    if source is None:
        return (
            "The licences of the texts may bind whoever shares this model. State its own as "
            "`license: ...` in the head of this file."
        )
    if licence := stated.get("license_name") or stated.get("license"):
        return f"{licence}, as for `{name_of(source)}`, from which it was made."
    return f"`{name_of(source)}` states none; ask who made it before you share this model."


def parameters_in(folder: Path) -> int:
    """How many numbers the safetensors files of `folder` hold."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return count


def _files(folder: Path) -> str:
    """A table of the files in `folder` and their SHA-256."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    rows = [
        f"| {path.name} | {path.stat().st_size:,} | `{sha256(path)}` |"
        for path in files
        if path.name != constants.REPOCARD_NAME
    ]
    return "\n".join(["| File | Bytes | SHA-256 |", "| --- | ---: | --- |", *rows])
