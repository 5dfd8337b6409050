"""The parts of a GPT, from the smallest to the transformer block that is made of them.

Each block writes its mathematics out. Where torch has a fused kernel for the same formula, the
kernel stands beside it: `config.fused_kernels` chooses for LayerNorm and GELU, transformers'
`attn_implementation` for attention. Both paths give the same numbers, up to rounding.
"""

# B batch, T query tokens, S key tokens, C hidden, H heads, D head size

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_scratch_gpt import GELU_FORMS, ScratchGPTConfig


class LayerNorm(nn.Module):
    """Give each token's vector mean 0 and variance 1, then scale and shift it by learned weights.

    y = weight * (x - mean) / sqrt(variance + eps) + bias (Ba et al. 2016, equations 3 and 4), with
    the biased variance: the squares are divided by C, not by C - 1.

    Args:
        hidden_size: C, the length of the vectors.
        eps: keeps the root away from zero.
        fused: use torch's kernel.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-5, fused: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.fused = fused
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise `hidden_states` (..., C), each vector by itself; same shape and dtype."""
        if self.fused:
            return F.layer_norm(hidden_states, self.weight.shape, self.weight, self.bias, self.eps)
        # Half precision cannot hold the square of 256; the kernel computes in float32 as well.
        x = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        mean = x.mean(dim=-1, keepdim=True)
        variance = (x - mean).square().mean(dim=-1, keepdim=True)
        normalized = (x - mean) / torch.sqrt(variance + self.eps)
        return (self.weight * normalized + self.bias).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, fused={self.fused}"


class GELU(nn.Module):
    """The Gaussian error linear unit, x * Phi(x) with the normal distribution Phi.

    GPT-2 uses the approximation 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), section 2 of
    Hendrycks & Gimpel 2016.

    Args:
        form: "tanh" for the approximation, "none" for the exact function (torch's names).
        fused: use torch's kernel.
    """

    def __init__(self, form: str = "tanh", fused: bool = True) -> None:
        super().__init__()
        self.form = form
        self.fused = fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the function to every element of `x`."""
        if self.fused:
            return F.gelu(x, approximate=self.form)
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))  # 1 + tanh(...) loses digits near 0
        if self.form == "none":
            y = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        else:
            y = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return y.to(dtype)

    def extra_repr(self) -> str:
        return f"form={self.form!r}, fused={self.fused}"


class FeedForward(nn.Module):
    """Widen each token's vector, apply GELU, narrow it again (Vaswani et al. 2017, section 3.3)."""

    def __init__(self, config: ScratchGPTConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None, "the configuration derives it"
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        form = GELU_FORMS.get(config.hidden_act)
        self.activation = (
            ACT2FN[config.hidden_act] if form is None else GELU(form, config.fused_kernels)
        )
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        # It starts smaller; a plain flag, which `_init_weights` of the model looks for.
        self.down_proj.is_residual_projection = True  # type: ignore[assignment]
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `hidden_states` (B, T, C) to (B, T, C), each token by itself."""
        return self.dropout(self.down_proj(self.activation(self.up_proj(hidden_states))))


def masked_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled dot-product attention, written out: softmax(Q K^T * scaling + mask) V.

    The formula is equation 1 of Vaswani et al. 2017. transformers calls it "eager".

    Args:
        module: the attention block, for its training mode and for whether it is causal.
        query: what each token looks for, (B, H, T, D).
        key: what each token offers, (B, H, S, D).
        value: what each token tells, (B, H, S, D).
        attention_mask: (B, 1, T, S), 0 where a token may look and a very negative number where it
            may not; or True and False. Without one, the last of the T tokens sees all S, the one
            before it all but the last, and so on.
        scaling: what scores are multiplied by, one over the square root of D.
        dropout: probability of dropping a weight.
        is_causal: False lets every token see all S where there is no mask; None asks `module`.
        kwargs: of other attention functions; not used.

    Returns:
        What each token has gathered, (B, T, H, D), and the weights, (B, H, T, S).
    """
    scores = (query * scaling) @ key.transpose(-2, -1)  # (B, H, T, S)
    # Half precision has too few digits to sum a thousand weights, and no room below its lowest
    # number for the sum of a score and the mask.
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:  # True where a token may look
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    elif module.is_causal if is_causal is None else is_causal:
        tokens, keys = scores.shape[-2:]
        is_future = torch.ones(tokens, keys, dtype=torch.bool, device=scores.device)
        is_future = is_future.triu(keys - tokens + 1)  # of 2 tokens, 3 keys: 001, 000
        # Not minus infinity: a row in which everything is masked would become NaN.
        scores = scores.masked_fill(is_future, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    gathered = weights @ value  # (B, H, T, D)
    return gathered.transpose(1, 2).contiguous(), weights


class MultiHeadAttention(nn.Module):
    """Let each token gather from those before it, in several heads at once.

    The heads are those of Vaswani et al. 2017, section 3.2. Query, key and value are projected by
    three matrices, not by one fused, so that tensor parallelism can give each device whole heads.

    Args:
        config: sizes and switches.
        layer_idx: which block it is in, from 0: its place in a cache.
    """

    is_causal = True

    def __init__(self, config: ScratchGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1
        self.attention_dropout = config.attention_dropout

        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj.is_residual_projection = True  # type: ignore[assignment]  # as `down_proj` is
        self.dropout = nn.Dropout(config.hidden_dropout)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache", raise_if_both_names=True)
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            hidden_states: (B, T, C).
            attention_mask: as transformers makes it for the attention implementation; None for a
                plain causal mask.
            cache: keys and values of earlier tokens; this block's are added to it.
            kwargs: passed on to the attention function.

        Returns:
            (B, T, C), and the attention weights (B, H, T, S) where the implementation computes
            them.
        """
        # -1, as tensor parallelism leaves this process some of the heads.
        tokens_by_heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(tokens_by_heads).transpose(1, 2)  # (B, H, T, D)
        key = self.k_proj(hidden_states).view(tokens_by_heads).transpose(1, 2)  # (B, H, T, D)
        value = self.v_proj(hidden_states).view(tokens_by_heads).transpose(1, 2)  # (B, H, T, D)
        if cache is not None:
            # S: the earlier tokens and these T. Without a cache S is T. Continuous batching's cache
            # changes `kwargs`, to what the attention function needs of this layer.
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)  # (B, H, S, D)

        # Outside a model, nobody has chosen an implementation.
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", masked_attention
        )
        gathered, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        joined = gathered.reshape(*hidden_states.shape[:-1], -1)  # (B, T, C)
        return self.dropout(self.o_proj(joined)), weights


class TransformerBlock(GradientCheckpointingLayer):
    """Attention, then feed-forward, each on normalised input and added to what came in.

    The additions are the shortcut connections; normalising before a sub-layer rather than after it
    is GPT-2's change to the original transformer (Radford et al. 2019, section 2.3). The arguments
    are those of `MultiHeadAttention`: `config` and `layer_idx`.
    """

    def __init__(self, config: ScratchGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = LayerNorm(
            config.hidden_size, config.layer_norm_eps, config.fused_kernels
        )
        self.self_attn = MultiHeadAttention(config, layer_idx)
        self.post_attention_layernorm = LayerNorm(
            config.hidden_size, config.layer_norm_eps, config.fused_kernels
        )
        self.mlp = FeedForward(config)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Map `hidden_states` (B, T, C) to (B, T, C); attention takes the mask and `kwargs`."""
        shortcut = hidden_states
        gathered, _ = self.self_attn(  # by name, as PEFT's adaption prompt takes its arguments
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            **kwargs,
        )
        hidden_states = shortcut + gathered

        shortcut = hidden_states
        return shortcut + self.mlp(self.post_attention_layernorm(hidden_states))
