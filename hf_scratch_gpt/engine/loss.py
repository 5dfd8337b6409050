"""The language model's loss in pieces, on a CPU, with its gradients computed along with it.

It takes 1.8 s for 1,024 tokens of GPT-2's on a CPU without half precision, where torch's public
`linear_cross_entropy` takes 3.0 s, and its result stays in float32.
"""

# N tokens that count, C hidden, V vocabulary

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .half import is_onednn_ahead, multiplied_as
from .private_ops import onednn_linear

PIECE = 2**26  # bytes of logits at a time
_BLOCK = 2**21  # logits that are turned into a gradient at a time
_WORDS = 2**12  # rows of the weight that are multiplied, or whose gradients are summed, at a time


def causal_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The language model's loss, with the arguments of its `loss_in_pieces` and `weight` (V, C).

    A few hundred tokens' logits, `hidden_states @ weight.T`, live at a time. From them follow their
    share of the loss and, by the derivative softmax(logits) - one_hot(label), of the gradients. It
    can be differentiated once.

    Raises:
        ValueError: there are more or fewer labels than hidden states, or a label is not a token of
            the vocabulary.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if shift_labels.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"labels have the shape {list(shift_labels.shape)}, and the tokens "
            f"{list(hidden_states.shape[:-1])}; give one label for each"
        )
    shift_labels = shift_labels.flatten()
    counted = (shift_labels != ignore_index).nonzero()[:, 0]  # (N,)
    shift_labels = shift_labels[counted]
    _check_labels(shift_labels, len(weight), ignore_index)
    dtype = product_dtype(weight)
    count = len(counted) if num_items_in_batch is None else num_items_in_batch
    rows = hidden_states.flatten(0, -2).index_select(0, counted)
    divisor = torch.as_tensor(count, dtype=torch.float32)
    loss: torch.Tensor = _LossOfPieces.apply(rows, weight, shift_labels, divisor, dtype)
    return loss


def product_dtype(weight: torch.Tensor) -> torch.dtype:
    """The type in which `causal_loss` multiplies; gradients may be too small for float16."""
    is_autocast = torch.is_autocast_enabled("cpu")
    return multiplied_as(torch.get_autocast_dtype("cpu") if is_autocast else weight.dtype)


def _check_labels(labels: torch.Tensor, vocab_size: int, ignore_index: int) -> None:
    lowest, highest = (int(label) for label in labels.aminmax()) if len(labels) else (0, 0)
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"the label {lowest if lowest < 0 else highest} is outside of the vocabulary of "
            f"{vocab_size} tokens; give {ignore_index} to tokens that do not count"
        )


class _LossOfPieces(torch.autograd.Function):
    """Sum of the cross entropies of `hidden @ weight.T` and `labels`, divided by `divisor`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        divisor: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """The loss of `hidden` (N, C), `weight` (V, C), `labels` (N,); products are of `dtype`."""
        ctx.dtypes = hidden.dtype, weight.dtype
        hidden, narrow = hidden.to(dtype), weight.to(dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None
        if ctx.needs_input_grad[1]:  # in half precision a sum of many pieces would lose digits
            wide = torch.promote_types(dtype, torch.float32)
            grad_weight = torch.empty_like(weight, dtype=wide)
        total = torch.zeros((), dtype=torch.float32, device="cpu")
        count = max(1, math.ceil(len(hidden) * len(weight) * dtype.itemsize / PIECE))
        size = max(1, math.ceil(len(hidden) / count))
        # The same memory for all pieces: fresh memory is slow, and may not be given back.
        products = hidden.new_empty(size, len(weight))
        pieces = zip(hidden.split(size), labels.split(size), grad_hidden.split(size), strict=True)
        for number, (rows, label, grad_rows) in enumerate(pieces):
            logits = products[: len(rows)]  # (n, V)
            _multiply(rows, narrow, logits)
            total += _to_gradient(logits, label, divisor)
            torch.mm(logits, narrow, out=grad_rows)
            if grad_weight is not None:
                _add_product(grad_weight, logits, rows, is_first=number == 0)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients that `forward` has computed, times that of the loss, a number."""
        of_hidden, of_weight = ctx.dtypes
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_loss != 1:
            grad_hidden = grad_hidden * grad_loss
            grad_weight = None if grad_weight is None else grad_weight * grad_loss
        if grad_weight is not None:
            grad_weight = grad_weight.to(of_weight)
        return grad_hidden.to(of_hidden), grad_weight, None, None, None


def _multiply(hidden: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor) -> None:
    """Put the product of `hidden` (n, C) and `weight` (V, C) into `logits` (n, V)."""
    # Of a small vocabulary oneDNN's copy would be as large as the product.
    if len(weight) <= _WORDS or not is_onednn_ahead(hidden):
        torch.mm(hidden, weight.T, out=logits)
        return
    for words, of_words in zip(weight.split(_WORDS), logits.split(_WORDS, dim=1), strict=True):
        of_words.copy_(onednn_linear(hidden, words, None))


def _to_gradient(logits: torch.Tensor, labels: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """Put the derivative of the loss in the place of `logits` (n, V), and return the loss's sum.

    A few rows at a time, in float32, which the processor's cache holds.
    """
    size, total = max(1, _BLOCK // logits.shape[1]), torch.zeros((), dtype=torch.float32)
    for rows, label in zip(logits.split(size), labels.split(size), strict=True):
        x = rows if rows.dtype == torch.float64 else rows.float()
        x -= x.amax(-1, keepdim=True)
        of_label = x.gather(1, label[:, None])
        sums = x.exp_().sum(-1, keepdim=True)
        total = total + (sums.log() - of_label).sum().float()
        x /= sums * divisor  # softmax
        x.scatter_add_(1, label[:, None], -torch.ones_like(of_label) / divisor)
        if x is not rows:
            rows.copy_(x)
    return total


def _add_product(
    grad_weight: torch.Tensor, grad_logits: torch.Tensor, hidden: torch.Tensor, is_first: bool
) -> None:
    """Add `grad_logits.T @ hidden` to `grad_weight` (V, C), or write the first there."""
    if grad_weight.dtype == hidden.dtype:
        beta = 0 if is_first else 1
        torch.addmm(grad_weight, grad_logits.T, hidden, beta=beta, out=grad_weight)
        return
    # Of half precision a few words at a time, since torch adds it by way of a copy.
    for words, of_words in zip(grad_logits.T.split(_WORDS), grad_weight.split(_WORDS), strict=True):
        product = torch.mm(words, hidden)
        of_words.copy_(product if is_first else of_words + product)
