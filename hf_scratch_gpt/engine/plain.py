"""Whether hooks, tracing, gradients or odd shapes and tensors are in the way of a shortcut."""

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def fit(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether `x` (..., C), `weight` (D, C) and `bias` (D,) are a CPU's and go together.

    With others torch knows better what to do.
    """
    return (
        x.is_cpu
        and weight.is_cpu
        and weight.layout == torch.strided
        and weight.ndim == 2
        and not x.is_nested
        and x.shape[-1:] == weight.shape[-1:]
        and (
            bias is None
            or (bias.is_cpu and bias.dtype == weight.dtype and bias.shape == weight.shape[:1])
        )
    )


def is_plain_inference(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether no gradient, no tracing, no other type of tensor and no cast is in the way."""
    return (
        not torch.is_grad_enabled()
        and x.dtype == weight.dtype
        and not torch.is_autocast_enabled("cpu")
        and is_plain(weight)
    )


def is_plain(weight: torch.Tensor) -> bool:
    """Whether `weight` is an ordinary tensor, and nothing traces, maps or watches operators."""
    return (
        type(weight) in (nn.Parameter, torch.Tensor)
        and not torch.compiler.is_exporting()
        and not torch.jit.is_tracing()
        # Code that watches operators knows torch's; oneDNN's would go uncounted.
        and not is_in_torch_dispatch_mode()
        and not is_transformed()
    )


def is_transformed() -> bool:
    """Whether `torch.func` or `vmap` is at work, or derivatives are computed forwards."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_changed(part: nn.Module) -> bool:
    """Whether hooks or a `forward` of its own change what `part` gives, or look at it.

    Hooks on all modules count as well.
    """
    hooks = [
        hook
        for of_a_kind in (
            part._forward_pre_hooks,
            part._forward_hooks,
            part._backward_pre_hooks,
            part._backward_hooks,
        )
        for hook in of_a_kind.values()
    ]
    # transformers leaves hooks behind that look for hidden states, if they were ever asked for.
    watchers = "transformers.utils.output_capturing"
    return (
        "forward" in vars(part)
        or nn.modules.module._has_any_global_hook()
        or any(hook.__module__ != watchers for hook in hooks)
    )
