"""Saved models come back as they were, to this process and to others."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model

from .subject import Subject, close, random_ids

# Fields that a configuration may derive from others.
DERIVED = ("intermediate_size", "head_dim", "num_key_value_heads")
LOAD_ELSEWHERE = """
import sys
package, folder = sys.argv[1:]
sys.modules[package] = None  # cannot be imported
import torch, transformers
expected = torch.load(folder + "/expected.pt")
trust = {"trust_remote_code": True}
base = transformers.AutoModel.from_pretrained(folder, **trust)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, **trust)
with torch.no_grad():
    states, logits = base(expected["ids"])[0], model(expected["ids"]).logits
assert torch.equal(states, expected["states"]), "AutoModel computes something else"
assert torch.equal(logits, expected["logits"]), "AutoModelForCausalLM computes something else"
"""


def check_same(model: Any, again: Any) -> None:
    """Assert that two models hold the same bits and compute the same bits."""
    tensors = {**dict(again.named_parameters()), **dict(again.named_buffers())}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(tensors[name], tensor), f"{name} has changed"
    ids = random_ids(model, 2, 9)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits), "the logits have changed"


def test_a_model_reloads_bit_by_bit(subject: Subject, tmp_path: Path) -> None:
    """`from_pretrained` gives what `save_pretrained` was given, buffers included.

    Serves everyone. Cure: register no buffer with persistent=False, as it comes back as garbage,
    unless `_init_weights` fills it; let names in the file be those of the module.
    """
    model = subject.random()
    model.save_pretrained(tmp_path)
    again, report = subject.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    check_same(model, again)


def test_a_model_in_shards_reloads_bit_by_bit(subject: Subject, tmp_path: Path) -> None:
    """Large models are saved as several files.

    Serves the hub, whose files are limited. Cure: as for one file.
    """
    model = subject.random()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check_same(model, subject.model_class.from_pretrained(tmp_path))


def test_a_configuration_reloads(subject: Subject, tmp_path: Path) -> None:
    """A configuration survives its file, fields that are derived from others included.

    Serves everyone. Cure: take every field as an argument of the configuration, and derive a field
    only where it is None.
    """
    config = subject.config(initializer_range=0.03)
    config.save_pretrained(tmp_path)
    again = subject.model_class.config_class.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()


def test_another_name_of_a_field_sets_the_field(subject: Subject) -> None:
    """A configuration made with the names of `attribute_map` equals one made with the fields'.

    Serves those who know another library's names. Cure: the names arrive in
    `super().__post_init__`; derive other fields after it, not before.
    """
    config_class: Any = subject.model_class.config_class
    names = config_class.attribute_map
    given = {name: subject.fields[name] for name in subject.fields if name not in DERIVED}
    standard = {names.get(name, name): value for name, value in given.items()}
    for name, field in names.items():
        if field in standard:
            others = {key: value for key, value in standard.items() if key != field}
            renamed = config_class(**others, **{name: standard[field]})
            assert renamed.to_dict() == config_class(**standard).to_dict(), f"{name} is not {field}"


def test_code_outside_transformers_travels_with_the_model(subject: Subject, tmp_path: Path) -> None:
    """A saved folder loads by `trust_remote_code=True` where the package is not installed.

    Serves whoever downloads the model. Cure: `register_for_auto_class` for the configuration and
    the models; a whole `auto_map`, as only the class that is saved is entered; imports of siblings
    as `from .name import X`, nothing else of the package.
    """
    package = subject.model_class.__module__.split(".")[0]
    if package == "transformers":
        pytest.skip("transformers' own code is everywhere")
    model = subject.random()
    model.save_pretrained(tmp_path)
    ids = random_ids(model, 2, 9)
    with torch.no_grad():
        states = model.base_model(ids)[0]
        expected = {"ids": ids, "states": states, "logits": model(ids).logits}
    torch.save(expected, tmp_path / "expected.pt")
    run = subprocess.run(
        [sys.executable, "-c", LOAD_ELSEWHERE, package, str(tmp_path)],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_declared(subject: Subject, tied: bool, tmp_path: Path) -> None:
    """The head shares the embedding's weight if `tie_word_embeddings` says so, and only then.

    Serves every loader. Cure: a dictionary, not a list, `_tied_weights_keys = {"lm_head.weight":
    "model.embed_tokens.weight"}`; `get_output_embeddings`; `self.post_init()` at the end of
    `__init__`.
    """
    model = subject.random(tie_word_embeddings=tied)
    assert isinstance(model._tied_weights_keys, dict)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    assert tied == (not stored.issuperset(model._tied_weights_keys))
    for each in (model, subject.model_class.from_pretrained(tmp_path)):
        head, embedding = each.get_output_embeddings(), each.get_input_embeddings()
        assert tied == (head.weight is embedding.weight)
        check_same(model, each)


@torch.no_grad()
def test_the_vocabulary_grows(subject: Subject) -> None:
    """`resize_token_embeddings` makes room for new tokens and leaves the others as they were.

    Serves fine-tuning for chats. Cure: `get_input_embeddings` and `get_output_embeddings`; ask
    `config.vocab_size` at each call, and keep no copy.
    """
    model = subject.random()
    size, ids = model.config.vocab_size, random_ids(model, 1, 6)
    logits = model(ids).logits
    model.resize_token_embeddings(size + 3, mean_resizing=False)
    grown = model(torch.cat([ids, torch.tensor([[size + 2]])], dim=1), labels=ids.new_ones(1, 7))
    assert grown.logits.shape == (1, 7, size + 3)
    close(grown.logits[:, :6, :size], logits)
    assert grown.loss.isfinite()


def test_safetensors_writes_the_model(subject: Subject, tmp_path: Path) -> None:
    """Parameters do not share storage, but for tied ones.

    Serves tools that write storages, such as `safetensors.torch.save_model`. Cure: a parameter of
    its own for each matrix, no views of one large tensor.
    """
    model, again = subject.random(), subject.fresh()
    file = str(tmp_path / "model.safetensors")
    save_model(model, file)
    load_model(again, file)
    check_same(model, again)


@torch.no_grad()
def test_half_precision_is_close(subject: Subject, tmp_path: Path) -> None:
    """A model loaded with dtype=torch.bfloat16 computes in it, near what float32 gives.

    Serves GPUs. Cure: make new tensors with the dtype of those that come in.
    """
    model = subject.random()
    model.save_pretrained(tmp_path)
    half = subject.model_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    ids = random_ids(model, 2, 9)
    expected, logits = model(ids).logits, half(ids).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.05 * expected.norm()
