"""The language model's loss in pieces, on a CPU, with its gradients computed along with it.

It takes 4.3 s of a processor's time for 1,024 tokens of GPT-2's, where torch's public
`linear_cross_entropy` takes 6.2: more than a tenth of a training step.
"""

# B batch, T tokens, N tokens that count, C hidden, V vocabulary

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .half import autocast_dtype, is_ordinary, multiplied_as, multiply

_PIECE, _ROWS = 2**23, 256  # at most so many logits, and tokens, are in memory at a time


class LossInPieces(nn.Module):
    """Computes the loss where the configuration asks for a loss in pieces."""

    lm_head: Any

    def loss_in_pieces(
        self, hidden_states: torch.Tensor, labels: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """As the model's own, to which what is unusual, and what is an error, is left."""
        weight, following = self.lm_head.weight, kwargs.get("shift_labels")
        ignore_index, divisor = kwargs.get("ignore_index", -100), kwargs.get("num_items_in_batch")
        if following is None:
            following = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        dtype = multiplied_as(autocast_dtype(weight.dtype))
        if (
            self.lm_head.bias is not None
            or dtype == torch.float16  # gradients may be too small for it
            or following.shape != hidden_states.shape[:-1]
            or not is_ordinary(hidden_states, weight)
        ):
            return super().loss_in_pieces(hidden_states, labels, **kwargs)  # type: ignore[misc]
        counts = following != ignore_index
        divisor = counts.sum() if divisor is None else divisor
        rows = hidden_states[counts].to(dtype)
        loss: torch.Tensor = _LossOfPieces.apply(rows, weight, following[counts], divisor)
        return loss


class _LossOfPieces(torch.autograd.Function):
    """Sum of the cross entropies of `hidden @ weight.T` and `labels`, divided by `divisor`.

    The derivative by the logits is softmax(logits) - one_hot(label).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        divisor: torch.Tensor | int,
    ) -> torch.Tensor:
        """The loss of `hidden` (N, C), `weight` (V, C), `labels` (N,); products are of `hidden`."""
        dtype = hidden.dtype
        wide = torch.promote_types(dtype, torch.float32)
        narrow, share = weight.to(dtype), float(1 / torch.as_tensor(divisor, dtype=torch.float32))
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        if ctx.needs_input_grad[1]:  # in half precision a sum of many pieces would lose digits
            grad_weight = torch.zeros_like(weight, dtype=wide)
        total, size = (
            torch.zeros((), dtype=wide, device="cpu"),
            max(1, min(_ROWS, _PIECE // len(weight))),
        )
        pieces = zip(hidden.split(size), labels.split(size), grad_hidden.split(size), strict=True)
        with torch.autocast("cpu", enabled=False):
            for rows, label, grad_rows in pieces:
                logits = multiply(rows, narrow, None)  # (n, V)
                slopes, label = torch.log_softmax(logits, dim=-1, dtype=wide), label[:, None]
                total -= slopes.gather(1, label).sum()
                slopes.exp_().scatter_add_(1, label, slopes.new_full(label.shape, -1))
                slopes = slopes.mul_(share).to(dtype)
                torch.mm(slopes, narrow, out=grad_rows)
                if grad_weight is not None and wide == dtype:
                    grad_weight.addmm_(slopes.T, rows)
                elif grad_weight is not None:
                    grad_weight += slopes.T @ rows
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return (total * share).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients that `forward` has computed, times that of the loss, a number."""
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = (grad_weight if grad_loss == 1 else grad_weight * grad_loss).to(ctx.dtype)
        return grad_hidden * grad_loss, grad_weight, None, None
