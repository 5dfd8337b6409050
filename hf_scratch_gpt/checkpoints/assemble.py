"""Plan which tensors make which, by the one table: those of a source ours, and ours GPT-2's."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from math import prod

import torch

from ..model.configuration_scratch_gpt import ScratchGPTConfig
from ..model.modeling_scratch_gpt import ScratchGPTForCausalLM
from .names import rules_of
from .sources import GPT2Source, StoredTensor, told_as_error

_NAMED = 5  # names in one message


@dataclass(frozen=True)
class Piece:
    """One rule applied to one layer: the tensors to write, and the stored ones that make them.

    Args:
        shapes: of the tensors to write by their names; equal parts along the first dimension.
        stored: what lies together along the first dimension; none where zeros are written.
        transposed: whether what is stored is transposed.
    """

    shapes: dict[str, tuple[int, ...]]
    stored: list[StoredTensor]
    transposed: bool = False

    @property
    def where(self) -> str:
        """Where the stored tensors come from, for messages."""
        return " or ".join(stored.where for stored in self.stored) or "zeros"

    def check(self) -> None:
        """Raise a ValueError if a stored tensor has not the shape or data type that it needs."""
        for stored in self.stored:
            outputs, *inputs = next(iter(self.shapes.values()))
            whole = (outputs * len(self.shapes) // len(self.stored), *inputs)
            stored.check(whole[::-1] if self.transposed else whole)

    def read(self) -> list[torch.Tensor]:
        """The tensors to write, views of what is stored where that is enough."""
        if not self.stored:
            return [torch.zeros(shape) for shape in self.shapes.values()]
        parts = [stored.read() for stored in self.stored]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return list((whole.T if self.transposed else whole).chunk(len(self.shapes)))


def plan(source: GPT2Source) -> list[Piece]:
    """How all tensors of our language model come from those of `source`; nothing is read yet.

    Raises:
        ValueError: a tensor is missing, left over, or has another shape or data type; names it.
    """
    layers, count = source.config.num_hidden_layers, len(source.tensors)
    if layers > count:  # a billion would take long to make
        raise ValueError(f"{source.path} has {count} tensors, too few for {layers} layers")
    with told_as_error(source.path):
        shapes = shapes_of(source.config)
    left = dict(source.tensors)
    pieces: list[Piece] = []
    missing: list[str] = []
    for rule in rules_of(layers):
        if rule.ours[0] not in shapes:  # a bias that this model does without, a head that is tied
            continue
        stored = [left.pop(rule.gpt2)] if rule.gpt2 in left else []
        if not stored and not (source.biases_optional and rule.gpt2.endswith("bias")):
            missing.append(rule.gpt2)
        ours = {name: shapes[name] for name in rule.ours}
        transposed = rule.is_matrix and source.inputs_first
        pieces.append(Piece(ours, stored, transposed))
    _raise_if_any(missing, f"{source.path} lacks the tensors")
    left_names = [tensor.name for tensor in left.values()]
    _raise_if_any(left_names, f"{source.path} has tensors that GPT-2 has not:")
    for piece in pieces:
        piece.check()
    return pieces


def _raise_if_any(names: list[str], what: str) -> None:
    """Raise a ValueError that tells the first few of `names`, if there are any."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    if names:
        raise ValueError(f"{what} {', '.join(names[:_NAMED])}{more}")


def shapes_of(config: ScratchGPTConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of our language model's tensors by name, without a head that is tied."""
    with torch.device("meta"):
        ours = ScratchGPTForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del ours["lm_head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in ours.items()}


def common_dtype(pieces: list[Piece]) -> torch.dtype:
    """The data type that holds every stored tensor of `pieces` without loss."""
    return reduce(torch.promote_types, (part.dtype for piece in pieces for part in piece.stored))


def num_parameters(pieces: list[Piece]) -> int:
    """How many numbers the tensors of `pieces` hold."""
    return sum(prod(shape) for piece in pieces for shape in piece.shapes.values())


def plan_export(ours: Mapping[str, StoredTensor], config: ScratchGPTConfig) -> list[Piece]:
    """How the tensors of transformers' GPT-2 come from `ours`; the inverse of `plan`."""
    pieces = []
    for rule in rules_of(config.num_hidden_layers):
        stored = [ours[name] for name in rule.ours if name in ours]
        if not stored and rule.gpt2.endswith("weight"):  # of a head that is tied
            continue
        # GPT-2 has biases everywhere.
        first, *inputs = stored[0].shape if stored else (config.hidden_size,)
        whole = (first * len(rule.ours), *inputs)
        name = rule.gpt2 if rule.gpt2 in ours else f"transformer.{rule.gpt2}"
        shape = whole[::-1] if rule.is_matrix else whole
        pieces.append(Piece({name: shape}, stored, rule.is_matrix))
    return pieces
