"""Turn the tensors of a source into ours, and ours into GPT-2's, by the one table of rules."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch

from ..model.configuration_scratch_gpt import ScratchGPTConfig
from ..model.modeling_scratch_gpt import ScratchGPTForCausalLM
from .names import TABLE, Rule
from .sources import GPT2Source, StoredTensor

_NAMED = 5  # names in one message


@dataclass(frozen=True)
class Piece:
    """One rule applied to one layer: stored tensors, and those of ours that they make.

    Args:
        names: ours.
        shapes: theirs, in the same order.
        stored: one for each of ours, or one for all of them, or none where ours are zeros.
        turned: whether the stored one is transposed.
    """

    names: list[str]
    shapes: list[tuple[int, ...]]
    stored: list[StoredTensor]
    turned: bool = False

    def origins(self) -> list[str]:
        """File and name of what each of ours is made from, for messages."""
        if len(self.stored) == len(self.names):
            return [stored.where for stored in self.stored]
        return [self.stored[0].where if self.stored else "zeros"] * len(self.names)

    def read(self) -> list[torch.Tensor]:
        """Our tensors, views of what is stored where that is enough."""
        if not self.stored:
            return [torch.zeros(shape) for shape in self.shapes]
        if len(self.stored) > 1:
            return [stored.read() for stored in self.stored]
        values = self.stored[0].read()
        return list((values.T if self.turned else values).chunk(len(self.names)))


def rules_of(config: ScratchGPTConfig) -> Iterator[tuple[Rule, int]]:
    """Each rule of the table, once for each layer where layers have it."""
    for rule in TABLE:
        for layer in range(config.num_hidden_layers if rule.in_block else 1):
            yield rule, layer


def plan(source: GPT2Source) -> list[Piece]:
    """How all tensors of our language model come from those of `source`; nothing is read yet.

    Raises:
        ValueError: a tensor is missing, left over, misshapen or not of numbers with a fraction;
            names it.
    """
    shapes = _our_shapes(source)
    left = dict(source.tensors)
    pieces: list[Piece] = []
    missing: list[str] = []
    for rule, layer in rules_of(source.config):
        names = [f"model.{name.format(layer)}" for name in rule.ours]
        if names[0] not in shapes:  # a bias that this model does without
            continue
        theirs = rule.textbook if source.textbook else (rule.gpt2,)
        wanted = [name.format(layer) for name in theirs]
        absent = [name for name in wanted if name not in left]
        if absent and not (source.biases_optional and rule.gpt2.endswith("bias")):
            missing += map(source.own_name, absent)
            continue
        stored = [] if absent else [left.pop(name) for name in wanted]
        expected = [shapes[name] for name in names]
        pieces.append(Piece(names, expected, stored, rule.is_matrix and source.inputs_first))
    if not source.config.tie_word_embeddings:
        theirs_head = "out_head.weight" if source.textbook else "lm_head.weight"
        if theirs_head in left:
            head = [left.pop(theirs_head)]
            pieces.append(Piece(["lm_head.weight"], [shapes["lm_head.weight"]], head))
        else:
            missing.append(theirs_head)
    if missing:
        raise ValueError(f"{source.path} lacks the tensors {_some(missing)}")
    if left:
        names_left = [tensor.name for tensor in left.values()]
        raise ValueError(f"{source.path} has tensors that GPT-2 has not: {_some(names_left)}")
    for piece in pieces:
        _check(piece)
    return pieces


def _some(names: list[str]) -> str:
    """The first few of `names`, and how many there are besides."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _our_shapes(source: GPT2Source) -> dict[str, tuple[int, ...]]:
    """The shapes of our language model's tensors by name."""
    layers = source.config.num_hidden_layers
    if layers > len(source.tensors):  # a billion would take long to make
        raise ValueError(
            f"{source.path} has {len(source.tensors)} tensors, too few for {layers} layers"
        )
    try:
        with torch.device("meta"):
            ours = ScratchGPTForCausalLM(source.config).state_dict()
    except (RuntimeError, TypeError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{source.path}: no tensor can have the sizes given ({reason})") from None
    return {name: tuple(tensor.shape) for name, tensor in ours.items()}


def _check(piece: Piece) -> None:
    """Raise a ValueError if a stored tensor of `piece` has not the shape or kind that ours need."""
    expected = piece.shapes
    if len(piece.stored) == 1:  # one for all of ours, which are its parts along the outputs
        outputs, *inputs = expected[0]
        whole = (outputs * len(expected), *inputs)
        expected = [whole[::-1] if piece.turned else whole]
    for stored, shape in zip(piece.stored, expected, strict=False):
        if stored.shape != shape:
            raise ValueError(
                f"{stored.where} has shape {list(stored.shape)}, and the configuration asks for "
                f"{list(shape)}"
            )
        if not stored.dtype.is_floating_point:
            raise ValueError(f"{stored.where} holds {stored.dtype}; weights are floating-point")


def common_dtype(pieces: list[Piece]) -> torch.dtype:
    """The data type that holds every stored tensor of `pieces` without loss."""
    dtypes = {stored.dtype for piece in pieces for stored in piece.stored}
    common = dtypes.pop()
    for dtype in dtypes:
        common = torch.promote_types(common, dtype)
    return common


def num_parameters(pieces: list[Piece]) -> int:
    """How many numbers our tensors hold."""
    return sum(prod(shape) for piece in pieces for shape in piece.shapes)


def disassemble(
    ours: Mapping[str, torch.Tensor], config: ScratchGPTConfig
) -> dict[str, torch.Tensor]:
    """The tensors of a GPT-2 in transformers' format, made of ours; the inverse of `plan`."""
    gpt2 = {}
    for rule, layer in rules_of(config):
        names = [f"model.{name.format(layer)}" for name in rule.ours]
        if names[0] in ours:
            whole = torch.cat([ours[name] for name in names])
        else:  # GPT-2 has biases everywhere
            whole = torch.zeros(
                len(names) * config.hidden_size, dtype=next(iter(ours.values())).dtype
            )
        gpt2[f"transformer.{rule.gpt2.format(layer)}"] = (
            whole.T.contiguous() if rule.is_matrix else whole
        )
    if "lm_head.weight" in ours:
        gpt2["lm_head.weight"] = ours["lm_head.weight"]
    return gpt2
