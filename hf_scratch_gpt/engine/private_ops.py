"""Everything private of torch that the engine uses, and a public way on without each.

A private name may change with any release of torch. `tests/engine/test_private_ops.py` then fails
by that name; until somebody mends it, users take the public way, which is slower and as right.
"""

# C length of an input vector, D of an output vector

import functools
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.backends import mkldnn
from torch.nn import functional as F

# What each function below needs, by its place in torch.
PLACES = {
    "linear": "ops.mkldnn._linear_pointwise",
    "reorder": "ops.mkldnn._reorder_linear_weight",
    "is_recorded": "utils._python_dispatch.is_in_torch_dispatch_mode",
    "has_global_hook": "nn.modules.module._has_any_global_hook",
}
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@functools.cache
def find(name: str) -> Any:
    """The function at one of `PLACES`; None if this torch does not have it."""
    try:
        return attrgetter(PLACES[name])(torch)
    except (AttributeError, RuntimeError):
        return None


@functools.cache
def has_onednn() -> bool:
    """Whether torch's private products by oneDNN are there and do what they did."""
    if not (mkldnn.is_available() and find("linear") and find("reorder")):
        return False
    x = torch.linspace(-2, 2, 32, dtype=torch.float32, device="cpu").view(4, 8)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            own = onednn_linear(x, pack(x), x[0, :4], gelu="tanh")
        expected = F.gelu(F.linear(x, x, x[0, :4]), approximate="tanh")
        return torch.allclose(own, expected, atol=1e-5)
    except (RuntimeError, TypeError, ValueError):  # as other arguments give
        return False


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A copy of `weight` (D, C) in the order in which oneDNN reads it; if `has_onednn`."""
    return find("reorder")(weight, None)


def onednn_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: str | None = None
) -> torch.Tensor:
    """The product of `x` (..., C) and `weight` (D, C), which may be packed; if `has_onednn`.

    `gelu` is a form of GELU, "tanh" or "none", to apply to the product.
    """
    if bias is not None:
        bias = bias.contiguous()  # oneDNN ignores strides
    after, form = ("none", "") if gelu is None else ("gelu", gelu)
    return find("linear")(x, weight, bias, after, [], form)


def is_recorded() -> bool:
    """Whether a mode records torch's operators, as a FLOP counter does: it knows no private ones.

    Without torch's function the answer is no, and such a counter counts too few.
    """
    is_in_mode = find("is_recorded")
    return is_in_mode is not None and bool(is_in_mode())


def version_of(tensor: torch.Tensor) -> int | None:
    """A number that grows with each change in place; None where torch does not count."""
    return None if tensor.is_inference() else getattr(tensor, "_version", None)


def is_watched(module: nn.Module) -> bool:
    """Whether a hook or a `forward` of its own may change, or look at, what `module` gives.

    Hooks on all modules count as well. Where torch does not tell, the answer is yes.
    """
    has_global_hook = find("has_global_hook")
    of_module = [getattr(module, name, None) for name in HOOKS]
    if has_global_hook is None or None in of_module:
        return True
    hooks = [hook for of_a_kind in of_module if of_a_kind for hook in of_a_kind.values()]
    # transformers leaves hooks behind that look for hidden states, once they were asked for.
    watchers = "transformers.utils.output_capturing"
    return (
        "forward" in vars(module)
        or bool(has_global_hook())
        or any(hook.__module__ != watchers for hook in hooks)
    )
