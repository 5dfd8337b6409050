"""Plan which tensors make which, by the one table: those of a source ours, and ours GPT-2's."""

from collections.abc import Collection, Mapping
from functools import partial, reduce
from math import prod

import torch

from ..model.configuration_scratch_gpt import ScratchGPTConfig
from ..model.modeling_scratch_gpt import ScratchGPTForCausalLM
from .names import rules_of
from .sources import GPT2Source, StoredTensor, joined, told_as_error

Planned = dict[str, StoredTensor]  # tensors to write, by their names; nothing is read yet
_NAMED = 5  # names in one message


def plan(source: GPT2Source) -> Planned:
    """All tensors of our language model, made of those of `source`.

    Raises:
        ValueError: a tensor is missing, left over, or has another shape or data type; names it.
    """
    layers = source.config.num_hidden_layers
    with told_as_error(source.path):
        shapes = shapes_of(source.config, len(source.tensors))
    left, planned, missing = dict(source.tensors), Planned(), []
    for rule in rules_of(layers):
        # Without a bias that this model does without, and a head that is tied.
        ours = {name: shapes[name] for name in rule.ours if name in shapes}
        if rule.gpt2 in left and ours:
            transposed = rule.is_matrix and source.inputs_first
            planned |= _parts(left.pop(rule.gpt2), ours, transposed)
        elif source.biases_optional and rule.gpt2.endswith("bias"):
            planned |= {name: _zeros(name, shape) for name, shape in ours.items()}
        elif ours:
            missing.append(rule.gpt2)
    raise_if_any(missing, f"{source.path} lacks the tensors")
    left_names = [tensor.name for tensor in left.values()]
    raise_if_any(left_names, f"{source.path} has tensors that GPT-2 has not:")
    return planned


def _parts(whole: StoredTensor, shapes: dict[str, tuple[int, ...]], transposed: bool) -> Planned:
    """Equal parts of `whole` along its outputs, by the names in `shapes`."""
    outputs, *inputs = next(iter(shapes.values()))
    shape = (outputs * len(shapes), *inputs)
    whole.check(shape[::-1] if transposed else shape)

    def part(number: int, tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.T if transposed else tensor).chunk(len(shapes))[number]

    numbered = enumerate(shapes.items())
    return {name: whole.made(partial(part, i), shape) for i, (name, shape) in numbered}


def _zeros(name: str, shape: tuple[int, ...]) -> StoredTensor:
    """A bias that the source does without; its type becomes any other without a loss."""
    return StoredTensor(name, "zeros", shape, torch.bool, partial(torch.zeros, shape))


def raise_if_any(names: Collection[str], what: str) -> None:
    """Raise a ValueError that tells the first few of `names`, if there are any."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    if names:
        raise ValueError(f"{what} {', '.join(sorted(names)[:_NAMED])}{more}")


def shapes_of(config: ScratchGPTConfig, count: int) -> dict[str, tuple[int, ...]]:
    """The shapes of our language model's tensors by name, without a head that is tied.

    A ValueError if there are only `count` tensors: a billion layers would take long to make.
    """
    if config.num_hidden_layers > count:
        raise ValueError(f"{count} tensors are too few for {config.num_hidden_layers} layers")
    with torch.device("meta"):
        ours = ScratchGPTForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del ours["lm_head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in ours.items()}


def common_dtype(planned: Planned) -> torch.dtype:
    """The data type that holds all tensors of `planned` without loss."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in planned.values()))


def num_parameters(planned: Planned) -> int:
    """How many numbers the tensors of `planned` hold."""
    return sum(prod(tensor.shape) for tensor in planned.values())


def plan_export(ours: Mapping[str, StoredTensor], config: ScratchGPTConfig) -> Planned:
    """The tensors of transformers' GPT-2, made of `ours`; the inverse of `plan`."""
    planned: Planned = {}
    for rule in rules_of(config.num_hidden_layers):
        name = rule.gpt2 if rule.gpt2 in ours else f"transformer.{rule.gpt2}"
        parts = [ours[part] for part in rule.ours if part in ours]
        if parts:
            whole = joined(parts)
            if rule.is_matrix:
                whole = whole.made(torch.t, whole.shape[::-1])
            planned[name] = whole
        elif rule.gpt2.endswith("bias"):  # GPT-2 has biases everywhere
            planned[name] = _zeros(name, (config.hidden_size * len(rule.ours),))
    return planned
