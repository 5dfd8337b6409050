"""Exchange parts of one model for faster ones, by one table, and put them back."""

import copyreg
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from ..model import modeling_scratch_gpt
from .compiling import compiled
from .generation import FastGeneration, Optimized
from .loss import LossInPieces
from .one_token import can_compute
from .packed import Int8Linear, PackedFeedForward, PackedLinear
from .products import fastest_way
from .rough_head import RoughHead
from .training import LeanAttention, LeanFeedForward, LeanLinear

# Classes whose mathematics the engine knows, and what goes before them for generation and for
# training. Ours stand by file and name, as a saved folder brings its own copy of the model's code.
_TABLE: dict[str | type, tuple[type | None, type | None]] = {
    "modeling_scratch_gpt.ScratchGPTForCausalLM": (FastGeneration, LossInPieces),
    "modeling_scratch_gpt.ScratchGPTModel": (None, None),
    "blocks_scratch_gpt.TransformerBlock": (None, None),
    "blocks_scratch_gpt.MultiHeadAttention": (None, LeanAttention),
    "blocks_scratch_gpt.FeedForward": (PackedFeedForward, LeanFeedForward),
    "blocks_scratch_gpt.LayerNorm": (None, None),
    "blocks_scratch_gpt.GELU": (None, None),
    nn.Linear: (PackedLinear, LeanLinear),
    nn.Embedding: (None, None),
    nn.Dropout: (None, None),
    nn.ModuleList: (None, None),
}
_MODEL = modeling_scratch_gpt.__package__
_GENERATION, _TRAINING = range(2)
# Formats of weights, and what torchao calls them.
FORMATS = {"int8": "Int8", "int4": "Int4", "fp8": "Float8"}


def optimize_for_generation(model: PreTrainedModel, weights: str | None = None) -> PreTrainedModel:
    """Change `model`, a language model of ours, so that its `generate` runs at its fastest.

    On a CPU greedy search and sampling, of one text or of several, padded on the left, are written
    by C++, which is compiled in some seconds and kept in the user's cache folder; a text that has
    ended is not computed on. Prompts and several texts use weights in an order of their own, which
    take as much memory again; greedy search of one text uses a copy of the head in eight bits. On a
    GPU, transformers compiles its step into CUDA graphs at the first call, for each number of texts
    anew.

    The outputs are those of before, up to the order in which sums are rounded. Change weights, add
    adapters, choose data type and device before, not afterwards; a weight that is changed all the
    same is used unpacked, but a change of a few of its numbers by way of its `data` goes unseen.
    Hooks, adapters, float16 and an activation that is not GELU are left to the model's own way, and
    beams and other searches to transformers' own loop. Copies and pickles of the model are
    optimized as well; their weights are packed anew.

    Args:
        model: in evaluation mode, on its device and in its data type.
        weights: "int8" keeps the weights of linear layers in a byte a number and one scale for each
            row; "int4" and "fp8" are for GPUs, where all three are torchao's.

    Returns:
        `model`; `restore(model)` makes it as it was, unless `weights` are given.

    Raises:
        ValueError: `weights` is not a format, or not one for the device; the model is not ours, is
            in training mode, cannot generate, or is optimized already.
        ImportError: torchao is missing.
        FileNotFoundError: a C++ compiler is missing.
        RuntimeError: the compiler fails.
    """
    _check_for_generation(model, weights)
    with _all_or_nothing(model, weights):
        _prepare_generation(model, weights)
    return model


@contextmanager
def _all_or_nothing(model: Any, weights: str | None) -> Iterator[None]:
    """An error or Ctrl-C while parts are exchanged leaves `model` as it was.

    Only `weights` in another format cannot be put back: then `restore` and saving refuse.
    """
    model.optimized = Optimized(weights)
    try:
        yield
    except BaseException:
        if weights is None:
            restore(model)
        raise


def _prepare_generation(model: Any, weights: str | None) -> None:
    if model.device.type == "cpu":
        compiled()
        _exchange(model, _GENERATION, Int8Linear if weights else None)
        if isinstance(model.lm_head, PackedLinear):
            model.lm_head.rough = RoughHead.of(model.lm_head.weight)
    elif weights is not None:
        _quantize(model, weights)
    if not isinstance(model, FastGeneration):
        model.__class__ = _before_class(FastGeneration, type(model))
    classes = {type(part) for part in model.modules()}
    if model.device.type == "cpu" and all(map(_row, classes)):
        with torch.device("meta"):
            fresh = type(model)(model.config)
        named = fresh.named_parameters(remove_duplicate=False)  # int8 unties a tied head
        shapes = {name: parameter.shape for name, parameter in named}
        model.optimized.known, model.optimized.shapes = classes, shapes
    if can_compute(model):
        layers = [part for part in model.modules() if isinstance(part, nn.Linear)]
        model.optimized.way = fastest_way(layers)


def optimize_for_training(model: PreTrainedModel) -> PreTrainedModel:
    """Change `model`, one of ours, so that it learns faster and in less memory on a CPU.

    Less is kept for the backward pass, a loss in pieces (`config.chunked_loss`) is computed by a
    loop of ours, and half precision without instructions for it is multiplied in float32. Outputs
    and gradients are those of before, up to rounding; they can be differentiated once. On other
    devices nothing changes. Do it before adapters are added.

    Returns:
        `model`; `restore(model)` makes it as it was.

    Raises:
        ValueError: the model is not ours, or is optimized already.
    """
    _check(model)
    if model.device.type == "cpu":
        with _all_or_nothing(model, None):
            _exchange(model, _TRAINING)
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Make an optimized `model` what it was.

    Returns `model`, unchanged if it is not optimized; a ValueError if its weights were quantized.
    """
    # PEFT's models hold the one that was optimized.
    owner: Any = next((part for part in model.modules() if "optimized" in vars(part)), None)
    if owner is None:
        return model
    weights = owner.optimized.weight_format
    if weights is not None:
        raise ValueError(f"weights in {weights} cannot be restored; load the model again")
    for part in model.modules():
        kind = getattr(type(part), "replaced_class", None)
        if kind is not None:
            vars(part).pop("packed", None)
            vars(part).pop("rough", None)
            part.__class__ = kind
    del owner.optimized
    return model


def _check(model: Any) -> None:
    if any("optimized" in vars(part) for part in model.modules()):
        raise ValueError("the model is optimized already; call restore(model) or load it again")
    if not any(_is_ours(type(part)) for part in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is not a model of hf_scratch_gpt, or its code was changed; "
            "the engine knows no other. ScratchGPTForCausalLM.from_pretrained loads a GPT-2"
        )


def _check_for_generation(model: Any, weights: str | None) -> None:
    remedy, kind = None, type(model).__name__
    if not isinstance(model, GenerationMixin):
        remedy = f"{kind} cannot generate; give a language model"
        if hasattr(model, "get_base_model"):  # PEFT's
            remedy = f"{kind} holds the model apart; give model.merge_and_unload(), or "
            remedy += "model.get_base_model()"
    elif model.training:
        remedy = "the model is in training mode; call model.eval() first"
    elif weights is not None and weights not in FORMATS:
        remedy = f"weights={weights!r} is not a format; give one of {', '.join(FORMATS)}"
    elif model.device.type == "meta":
        remedy = "the model is on the device meta, without numbers; load its weights first"
    elif model.device.type == "cpu" and weights not in (None, "int8"):
        remedy = f"weights={weights!r} needs a GPU; give 'int8' on a CPU"
    if remedy is not None:
        raise ValueError(remedy)
    _check(model)


def _row(kind: type) -> tuple[type | None, type | None] | None:
    """The row of the table for a class, or for what it was before an exchange."""
    kind = getattr(kind, "replaced_class", kind)
    file = kind.__module__.rpartition(".")[2]
    row = _TABLE.get(f"{file}.{kind.__name__}")
    return _TABLE.get(kind) or (row if row and _is_our_code(kind.__module__, file) else None)


def _is_our_code(module: str, file: str) -> bool:
    """Whether a module, such as a saved folder's own copy, has the code of the file of the model.

    Somebody may have changed it there, and the engine would compute what it was before.
    """
    own = f"{_MODEL}.{file}"
    if module == own:
        return True
    try:
        return inspect.getsource(sys.modules[module]) == inspect.getsource(sys.modules[own])
    except (KeyError, OSError):  # it came from no file
        return False


def _is_ours(kind: type) -> bool:
    """Whether a class is one of the model's, or derived from one."""
    return any(_row(each) and each not in _TABLE for each in kind.__mro__)


def _exchange(model: nn.Module, purpose: int, linear: type | None = None) -> None:
    """Exchange ours, and the linear layers that ours hold, by the table; `linear` for its own.

    An adapter's layers, those that it wraps, and whatever else there is, stay as they are.
    """
    part: Any
    ours = [module for module in model.modules() if _is_ours(type(module))]
    held = [part for module in ours for part in module.children() if type(part) is nn.Linear]
    for part in ours + held:
        faster = (_row(type(part)) or (None, None))[purpose]
        if type(part) is nn.Linear:
            faster = (linear or faster) if type(part.weight) is nn.Parameter else None
        if faster is not None and "forward" not in vars(part):
            part.__class__ = _before_class(faster, type(part))
            if hasattr(part, "prepare"):
                part.prepare()


class _Faster(type):
    """The class of what `_before_class` makes, so that pickle can make it anew."""


_made: dict[tuple[type, ...], type] = {}


def _before_class(faster: type, kind: type) -> Any:
    """`faster` before `kind`, under the name of `kind`: it is saved, and tools look for it."""
    members = {"__module__": kind.__module__, "replaced_class": kind}
    if (faster, kind) not in _made:
        _made[faster, kind] = _Faster(kind.__name__, (faster, kind), members)
    return _made[faster, kind]


copyreg.pickle(_Faster, lambda kind: (_before_class, kind.__bases__))


def _quantize(model: PreTrainedModel, weights: str) -> None:
    """Keep the weights of linear layers in torchao's format `weights`."""
    try:
        from torchao import quantization
    except ImportError:
        raise ImportError(
            f"weights={weights!r} needs torchao on a GPU; pip install 'hf_scratch_gpt[torchao]'"
        ) from None
    quantization.quantize_(model, getattr(quantization, f"{FORMATS[weights]}WeightOnlyConfig")())
