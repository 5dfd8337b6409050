"""A change of architecture: SwiGLU (Shazeer 2020, equation 6) for GELU, RMSNorm for LayerNorm.

As an engineer makes it in a copy of the model, in two steps: the mathematics, and the promises that
go with it.
"""

BLOCKS, CONFIGURATION, MODELING = "blocks", "configuration", "modeling"

NORM = '''class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps) (Zhang & Sennrich 2019, equation 4)."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, fused: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise `hidden_states` (..., C), each vector by itself."""
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


class LayerNorm(nn.Module):'''

ACTIVATION = """        form = GELU_FORMS.get(config.hidden_act)
        self.activation = (
            ACT2FN[config.hidden_act] if form is None else GELU(form, config.fused_kernels)
        )
"""

# Which text of which file is replaced by what.
MATHEMATICS = [
    (BLOCKS, "class LayerNorm(nn.Module):", NORM),
    (BLOCKS, "_layernorm = LayerNorm(", "_layernorm = RMSNorm("),
    (MODELING, "self.norm = LayerNorm(", "self.norm = RMSNorm("),
    (MODELING, "import LayerNorm, MultiHead", "import RMSNorm, MultiHead"),
    (
        BLOCKS,
        "        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)\n",
        "        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)\n"
        "        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)\n",
    ),
    (BLOCKS, ACTIVATION, "        self.activation = nn.SiLU()\n"),
    (
        BLOCKS,
        "return self.dropout(self.down_proj(self.activation(self.up_proj(hidden_states))))",
        "gate = self.activation(self.gate_proj(hidden_states))\n"
        "        return self.dropout(self.down_proj(gate * self.up_proj(hidden_states)))",
    ),
]
PROMISES = [
    (
        CONFIGURATION,
        '"layers.*.mlp.up_proj": "colwise",',
        '"layers.*.mlp.up_proj": "colwise",\n        "layers.*.mlp.gate_proj": "colwise",',
    ),
]
