"""The language model's loss in pieces, without all logits in memory at once."""

# N tokens that count, C hidden, V vocabulary

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_PIECE = 2**24  # logits at a time, of four bytes
_WORDS = 2**12  # rows of the weight whose gradients are summed at a time


def chunked_causal_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """transformers' `ForCausalLMLoss` of the logits `hidden_states @ weight.T`, with its arguments.

    A batch of 2,048 tokens has 100 million logits of GPT-2's; transformers' loss holds them three
    times. Here a few hundred tokens' logits live at a time, from which follow their share of the
    loss and, by the derivative softmax(logits) - one_hot(label), of the gradients.

    Args:
        hidden_states: (B, T, C).
        weight: the output head's, (V, C).
        labels: (B, T); token t is compared with label t + 1. Where it is `ignore_index`, it does
            not count.
        num_items_in_batch: what the sum over tokens is divided by; their number if not given.
        shift_labels: (B, T), labels that are shifted already, in place of `labels`.

    Returns:
        The mean negative log-likelihood in nats. It can be differentiated once.

    Raises:
        ValueError: there are more or fewer labels than hidden states.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if shift_labels.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"labels have the shape {list(shift_labels.shape)}, and the tokens "
            f"{list(hidden_states.shape[:-1])}; give one label for each"
        )
    shift_labels = shift_labels.flatten().to(hidden_states.device)
    counted = (shift_labels != ignore_index).nonzero()[:, 0]  # (N,)
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
    total: torch.Tensor = _SumOfLosses.apply(
        hidden_states.flatten(0, -2).index_select(0, counted), weight, shift_labels[counted]
    )
    if num_items_in_batch is None:
        return total / len(counted)
    return total / num_items_in_batch


class _SumOfLosses(torch.autograd.Function):
    """Sum of the cross entropies of `hidden @ weight.T` and `labels`; its gradients come along."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        grad_hidden = torch.empty_like(hidden)
        # In half precision a sum of many pieces would lose digits.
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=wide)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        size = max(1, _PIECE // len(weight))
        # All pieces in the same memory: fresh memory is slow, and may not be given back.
        products = hidden.new_empty(min(size, len(hidden)), len(weight))
        logits = products if products.dtype == torch.float32 else products.float()
        pieces = zip(hidden.split(size), labels.split(size), grad_hidden.split(size), strict=True)
        for rows, label, grad_rows in pieces:
            products, logits = products[: len(rows)], logits[: len(rows)]  # (n, V)
            torch.mm(rows, weight.T, out=products)
            logits.copy_(products)
            logits -= logits.amax(-1, keepdim=True)
            of_label = logits.gather(1, label[:, None])
            softmax = logits.exp_()
            sums = softmax.sum(-1, keepdim=True)
            total += (sums.log() - of_label).sum()
            softmax /= sums
            softmax.scatter_add_(1, label[:, None], torch.full_like(of_label, -1.0))
            grad_logits = products.copy_(softmax)
            torch.mm(grad_logits, weight, out=grad_rows)
            if weight.dtype == wide:
                grad_weight.addmm_(grad_logits.T, rows)
            else:  # a few words at a time, since the sum makes a copy in float32
                words = zip(grad_logits.T.split(_WORDS), grad_weight.split(_WORDS), strict=True)
                for grad_words, of_words in words:
                    of_words += grad_words @ rows
        if weight.dtype == torch.bfloat16:  # in float16, before it is divided, it may be too large
            grad_weight = grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_total: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if len(grad_hidden):  # else no token counts, and the mean over none is no number
            grad_weight = grad_weight * grad_total
        return grad_hidden * grad_total, grad_weight.to(grad_hidden.dtype), None
