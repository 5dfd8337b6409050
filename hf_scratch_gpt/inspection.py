"""What happens to a text in a language model: shapes, attention, and what it expects next."""

# T tokens, L layers with attention, H heads, K likeliest tokens, V vocabulary

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .characters import encoded
from .files import new_file

# Longer texts make pages of tens of megabytes, with squares too small to see.
LONGEST_PAGE = 128

_TEMPLATE = Path(__file__).with_name("inspection.html")


@dataclass(frozen=True)
class Block:
    """A part of a model, or several that are alike and follow one another.

    Args:
        name: its name in the part that holds it.
        kind: its class.
        depth: how many parts it stands in.
        parameters, storage: how many numbers it has, and their bytes; those shared with a part
            before count here too.
        is_shared: all its parameters are those of a part before.
        input, output: shapes of the tensor that went in and came out, if it was called by itself.
    """

    name: str
    kind: str
    depth: int
    parameters: int
    storage: int
    is_shared: bool
    input: tuple[int, ...] | None
    output: tuple[int, ...] | None


@dataclass(frozen=True)
class Expected:
    """A `token` that may come next, its `id` and its `probability`."""

    token: str
    id: int
    probability: float


@dataclass(frozen=True)
class Inspection:
    """What `inspect` has seen.

    Args:
        model: name of the model's class.
        tokens, ids: the text's, T of them.
        blocks: the parts of the model, in the order of their calls; the first is the model.
        likeliest: for each token, the K likeliest after it, the likeliest first.
        following: for each token but the last, the probability of the one that does follow.
        attention: how much each token looks at each, (L, H, T, T); each row sums to 1. None if the
            model does not give it.
    """

    model: str
    tokens: list[str]
    ids: list[int]
    blocks: list[Block]
    likeliest: list[list[Expected]]
    following: list[float]
    attention: torch.Tensor | None


@torch.inference_mode()
def inspect(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, likeliest: int = 10
) -> Inspection:
    """Run `model` on a text and look into it.

    Args:
        model: any causal language model; it is put into evaluation mode.
        tokenizer: its tokenizer.
        text: of at least one token, and at most as many as the model has positions.
        likeliest: K.

    Raises:
        ValueError: the text has no tokens or too many, or `likeliest` is below 1.
    """
    if likeliest < 1:
        raise ValueError(f"likeliest={likeliest} is below 1; ask for at least one token")
    ids = encoded(tokenizer, text, return_tensors="pt")["input_ids"]  # (1, T)
    if not ids.numel():
        raise ValueError(
            f"the tokenizer makes 0 tokens of {text[:40]!r}; give at least one character, "
            "or a model that is saved with its vocabulary"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and ids.shape[1] > limit:
        raise ValueError(
            f"the text has {ids.shape[1]} tokens, the model {limit} positions; give a shorter one"
        )
    model.eval()
    with _written_out_attention(model), _recorded_shapes(model) as shapes:
        outputs = model(input_ids=ids.to(model.device), output_attentions=True, use_cache=False)
    probabilities = outputs.logits[0].float().softmax(-1).cpu()  # (T, V)
    top = probabilities.topk(min(likeliest, probabilities.shape[-1]))
    layers = [weights[0] for weights in outputs.attentions or () if weights is not None]
    return Inspection(
        model=type(model).__name__,
        tokens=[token_text(tokenizer, id_) for id_ in ids[0].tolist()],
        ids=ids[0].tolist(),
        blocks=list(_blocks(model, type(model).__name__, 0, shapes, set())),
        likeliest=[
            [Expected(token_text(tokenizer, id_), id_, p) for p, id_ in zip(*row, strict=True)]
            for row in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ],
        following=probabilities[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist(),
        attention=torch.stack(layers).float().cpu() if layers else None,
    )


def token_text(tokenizer: PreTrainedTokenizerBase, id_: int) -> str:
    """The text of the token `id_` by `tokenizer`, or its own name for a part of a character."""
    text = tokenizer.decode([id_])
    return str(tokenizer.convert_ids_to_tokens(id_)) if not text or "\ufffd" in text else text


@contextmanager
def _written_out_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attention that computes its weights; fused kernels do not."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


Shapes = dict[nn.Module, tuple[tuple[int, ...] | None, tuple[int, ...] | None]]


@contextmanager
def _recorded_shapes(model: nn.Module) -> Iterator[Shapes]:
    """What goes into each module and what comes out, by shape, while the context lasts."""
    shapes: Shapes = {}

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        shapes[module] = _shape((*args, *kwargs.values())), _shape(output)

    hooks = [m.register_forward_hook(record, with_kwargs=True) for m in model.modules()]
    try:
        yield shapes
    finally:
        for hook in hooks:
            hook.remove()


def _shape(values: Any) -> tuple[int, ...] | None:
    """The shape of the first tensor in `values`."""
    if isinstance(values, torch.Tensor):
        return tuple(values.shape)
    values = values.values() if isinstance(values, dict) else values
    return next((tuple(v.shape) for v in values if isinstance(v, torch.Tensor)), None)


def _blocks(
    module: nn.Module, name: str, depth: int, shapes: Shapes, seen: set[nn.Parameter]
) -> Iterator[Block]:
    """`module` and what it holds, as it was called; `seen` are parameters of parts before."""
    parameters = list(module.parameters())
    yield Block(
        name=name,
        kind=type(module).__name__,
        depth=depth,
        parameters=sum(p.numel() for p in parameters),
        storage=sum(p.numel() * p.element_size() for p in parameters),
        is_shared=bool(parameters) and seen.issuperset(parameters),
        **dict(zip(("input", "output"), shapes.get(module, (None, None)), strict=True)),
    )
    for child_name, child in sorted(module.named_children(), key=lambda c: _place(c[1], shapes)):
        if isinstance(child, nn.ModuleList):
            parts = [
                list(_blocks(part, f"{child_name}.{number}", depth + 1, shapes, seen))
                for number, part in enumerate(child)
            ]
            yield from _folded(parts)
        elif not isinstance(child, nn.Dropout):  # which does nothing outside of training
            yield from _blocks(child, child_name, depth + 1, shapes, seen)
    seen.update(parameters)


def _place(module: nn.Module, shapes: Shapes) -> int:
    """When the last part of `module` was called, in the order of calls."""
    called = {part: place for place, part in enumerate(shapes)}
    return max(called.get(part, -1) for part in module.modules())


def _folded(parts: list[list[Block]]) -> Iterator[Block]:
    """Parts, each with what it holds; those that are like the one before are one block together."""
    for _, alike in groupby(parts, key=lambda part: [replace(part[0], name=""), *part[1:]]):
        first, *others = alike
        yield from first
        if others:
            blocks = [part[0] for part in others]
            last = f"-{blocks[-1].name.rpartition('.')[2]}" if blocks[1:] else ""
            yield replace(
                blocks[0],
                name=f"{blocks[0].name}{last}, alike",
                parameters=sum(block.parameters for block in blocks),
                storage=sum(block.storage for block in blocks),
            )


def write_page(inspection: Inspection, path: Path) -> None:
    """Write `inspection` to `path` as an HTML page that needs nothing else, all at once.

    It shows the tokens, the attention of each head as a heat map, what the model expects after each
    token, and the shapes.

    Raises:
        ValueError: the text is longer than `LONGEST_PAGE`, or the model gives no causal attention.
        OSError: the page cannot be written.
    """
    tokens, attention = len(inspection.tokens), inspection.attention
    if tokens > LONGEST_PAGE:
        raise ValueError(
            f"the text has {tokens} tokens, and a page shows at most {LONGEST_PAGE}; shorten it"
        )
    if attention is None or attention.triu(1).any():
        raise ValueError(
            f"{inspection.model} gives no weights of causal attention, which the page is about; "
            "leave the page out"
        )
    rows, columns = torch.tril_indices(tokens, tokens)
    weights = (attention[:, :, rows, columns] * 65535).round().numpy().astype("<u2")
    data = {
        **{name: value for name, value in vars(inspection).items() if name != "attention"},
        "blocks": [asdict(block) for block in inspection.blocks],
        "likeliest": [[asdict(token) for token in row] for row in inspection.likeliest],
        "layers": attention.shape[0],
        "heads": attention.shape[1],
        # Row after row of each head's lower triangle, in 65535ths.
        "attention": base64.b64encode(weights.tobytes()).decode(),
    }
    # A token may hold what would end the script that holds the data.
    text = json.dumps(data).replace("<", "\\u003c")
    with new_file(path) as unfinished:
        unfinished.write_text(_TEMPLATE.read_text("utf-8").replace("$DATA", text), "utf-8")
