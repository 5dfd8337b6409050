"""Turn the tensors of a source into ours, and ours into GPT-2's, by the one table of rules."""

from collections.abc import Iterator, Mapping

import torch
from transformers.utils import logging

from hf_scratch_gpt import ScratchGPTConfig, ScratchGPTForCausalLM
from hf_scratch_gpt.gpt2_checkpoints import TABLE, Rule

from .sources import GPT2Source, StoredTensor


def rules_of(config: ScratchGPTConfig) -> Iterator[tuple[Rule, int]]:
    """Each rule of the table, once for each layer where layers have it."""
    for rule in TABLE:
        for layer in range(config.num_hidden_layers if rule.in_block else 1):
            yield rule, layer


def assemble(source: GPT2Source, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """All tensors of our language model, read from `source` one after the other.

    Args:
        source: opened by its reader.
        dtype: what to cast to; None keeps each tensor's.

    Raises:
        ValueError: a tensor is missing, left over, misshapen, or holds NaN or infinity; names it.
    """
    with torch.device("meta"):
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in ScratchGPTForCausalLM(source.config).state_dict().items()
        }
    left = dict(source.tensors)
    ours: dict[str, torch.Tensor] = {}
    missing: list[str] = []
    rules = list(rules_of(source.config))
    for rule, layer in logging.tqdm(rules, desc="Converting tensors"):
        names = [f"model.{name.format(layer)}" for name in rule.ours]
        if names[0] not in shapes:  # a bias that this model does without
            continue
        sources = rule.textbook if source.textbook else (rule.gpt2,)
        wanted = [name.format(layer) for name in sources]
        absent = [name for name in wanted if name not in left]
        if absent and source.biases_optional and rule.gpt2.endswith("bias"):
            ours.update({name: torch.zeros(shapes[name], dtype=dtype) for name in names})
            continue
        if absent:
            missing += absent
            continue
        stored = [left.pop(name) for name in wanted]
        expected = [shapes[name] for name in names]
        parts = _parts(rule, stored, expected, source)
        for name, part in zip(names, parts, strict=True):
            ours[name] = _owned(part, len(parts), dtype)
    if not source.config.tie_word_embeddings:
        head = "out_head.weight" if source.textbook else "lm_head.weight"
        if head in left:
            stored_head = left.pop(head)
            _check_shape(stored_head, shapes["lm_head.weight"])
            tensor = _finite(stored_head)
            ours["lm_head.weight"] = _owned(tensor, 1, dtype)
        else:
            missing.append(head)
    if missing:
        raise ValueError(f"{source.path} lacks the tensors {', '.join(missing)}")
    if left:
        names_left = ", ".join(tensor.name for tensor in left.values())
        raise ValueError(f"{source.path} has tensors that GPT-2 has not: {names_left}")
    return ours


def _parts(
    rule: Rule,
    stored: list[StoredTensor],
    shapes: list[tuple[int, ...]],
    source: GPT2Source,
) -> list[torch.Tensor]:
    """The parts that `rule` makes of the stored tensors, checked against the shapes of ours."""
    if len(stored) == len(shapes) > 1:
        for tensor, shape in zip(stored, shapes, strict=True):
            _check_shape(tensor, shape)
        return [_finite(tensor) for tensor in stored]
    outputs = sum(shape[0] for shape in shapes)
    whole = (outputs, *shapes[0][1:])
    turned = rule.is_matrix and source.inputs_first
    _check_shape(stored[0], whole[::-1] if turned else whole)
    values = _finite(stored[0])
    return list((values.T if turned else values).chunk(len(shapes)))


def _check_shape(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{tensor.where} has shape {list(tensor.shape)}, and the configuration asks for "
            f"{list(shape)}"
        )


def _finite(stored: StoredTensor) -> torch.Tensor:
    tensor = stored.read()
    if tensor.numel():
        lowest, highest = tensor.aminmax()  # both are NaN if any value is
        if not (lowest.isfinite() and highest.isfinite()):
            raise ValueError(f"{stored.where} holds NaN or infinity")
    return tensor


def _owned(part: torch.Tensor, parts: int, dtype: torch.dtype | None) -> torch.Tensor:
    """`part`, one of `parts` of a tensor, in memory of its own."""
    cast = part.to(dtype or part.dtype)
    if cast is not part or not cast.is_contiguous():
        return cast.contiguous()
    return cast.clone() if parts > 1 else cast


def disassemble(
    ours: Mapping[str, torch.Tensor], config: ScratchGPTConfig
) -> dict[str, torch.Tensor]:
    """The tensors of a GPT-2 in transformers' format, made of ours; the inverse of `assemble`."""
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
