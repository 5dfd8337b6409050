"""What tools look up in a model by type, name or table."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .subject import Subject, blocks, matrices


def test_matrices_of_blocks_are_plain_linear_layers(subject: Subject) -> None:
    """`type(module) is nn.Linear` for all that hold a matrix.

    Serves quantisers, some adapters and counters of operations, which pass over other types, and
    subclasses too, in silence. Cure: `nn.Linear` itself.
    """
    found = matrices(subject.fresh())
    assert found, "no module of a block holds a matrix"
    others = {name: type(module).__name__ for name, module in found.items()}
    assert not {name: kind for name, kind in others.items() if type(found[name]) is not nn.Linear}


def test_blocks_are_not_split(subject: Subject) -> None:
    """`_no_split_modules` names the class of the blocks.

    Serves `device_map="auto"` and FSDP. Cure: that.
    """
    model = subject.fresh()
    _, layers = blocks(model)
    assert type(layers[0]).__name__ in (model._no_split_modules or [])


def test_tables_know_the_class(subject: Subject) -> None:
    """`MODEL_FOR_CAUSAL_LM_MAPPING_NAMES` holds the name of the class under its `model_type`.

    Serves `Trainer`, which shifts labels under label smoothing for these names alone, pipelines and
    servers. Cure: enter it when the module is imported, so that a copy of the code does too.
    """
    model_type = subject.config().model_type
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) == subject.model_class.__name__


def test_fresh_weights(subject: Subject) -> None:
    """Matrices start with std `initializer_range`, norms at 1 and biases at 0.

    Projections onto the shortcut path may start smaller by the root of twice the number of layers
    (GPT-2 does), in all blocks alike; norms that add 1 to their weight, at 0. Serves training from
    nothing. Cure: `self.post_init()` at the end of `__init__`; new parameters in `_init_weights`.
    """
    std = getattr(subject.config(), "initializer_range", None)
    if std is None:
        pytest.skip("the configuration has no initializer_range")
    model = subject.fresh()
    smaller = std / math.sqrt(2 * model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            found = parameter.std().item()
            assert any(abs(found / each - 1) < 0.1 for each in (std, smaller)), (name, found)
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert parameter.unique().tolist() in ([0.0], [1.0]), name


def spreads(model: Any) -> dict[str, float]:
    """The standard deviation of each parameter."""
    return {name: parameter.std().item() for name, parameter in model.named_parameters()}


def test_all_of_init_weights_is_done(subject: Subject) -> None:
    """A fresh model starts as `_init_weights`, called for every module, says.

    Serves training from nothing: what `_init_weights` does to the children of a module is skipped
    for code outside transformers, as the children are done already. Cure: change only the module's
    own parameters, by the functions of `transformers.initialization`; mark a leaf, such as
    `self.o_proj.is_residual_projection = True`.
    """
    model, asked = subject.fresh(), subject.fresh()
    for tensor in [*asked.parameters(), *asked.modules(), *asked.buffers()]:
        if hasattr(tensor, "_is_hf_initialized"):
            del tensor._is_hf_initialized
    for module in reversed(list(asked.modules())):  # children come first
        asked._init_weights(module)
    expected = spreads(asked)
    for name, std in spreads(model).items():
        assert math.isclose(std, expected[name], rel_tol=0.1, abs_tol=1e-6), name


def test_what_is_decayed(subject: Subject, tmp_path: Path) -> None:
    """`Trainer` decays matrices, and neither norms nor biases.

    Serves training. Cure: `Trainer` goes by the type `nn.LayerNorm` and by names: let those of
    norms end in `norm` or hold `layernorm`, and those of biases hold `bias`.
    """
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = subject.fresh()
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    decayed = set(Trainer(model=model, args=arguments).get_decay_parameter_names(model))
    named = dict(model.named_parameters(remove_duplicate=False))
    assert decayed == {name for name, parameter in named.items() if parameter.ndim > 1}


def test_every_linear_layer_is_in_the_plan(subject: Subject) -> None:
    """`base_model_tp_plan` says for each matrix of a block how devices share it.

    Serves tensor parallelism: what is left out is computed by every device in full, and between two
    that are split it is wrong. Cure: the layers that widen as "colwise", those that narrow as
    "rowwise".
    """
    model = subject.fresh()
    plan = model.config.base_model_tp_plan or {}
    prefix, _ = blocks(model)
    asked = {
        f"{prefix}.*.{name.removeprefix(prefix).lstrip('.').split('.', 1)[1]}"
        for name in matrices(model)
    }
    missing = sorted(asked - set(plan))
    assert not missing, f"not in base_model_tp_plan: {missing}"


@torch.no_grad()
def test_embeddings_are_found(subject: Subject) -> None:
    """`get_input_embeddings` and `get_output_embeddings` give the embedding and the head.

    Serves PEFT, resizing and quantisers, which spare the head. Cure: name them `embed_tokens` and
    `lm_head`, or write the two methods.
    """
    model = subject.fresh()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.weight.shape == (model.config.vocab_size, model.config.hidden_size)
    assert head.weight.shape == embedding.weight.shape
    assert embedding is model.base_model.get_input_embeddings()
