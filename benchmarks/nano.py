"""nanoGPT's training step, as its description tells it: a GPT-2 in few lines, compiled whole.

One projection gives query, key and value, attention is torch's fused one, the head is tied to the
embedding. Weight decay and dropout are left out, as for all that it is compared with.
"""

# B texts, T tokens, C hidden, V vocabulary

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel


class _Block(nn.Module):
    def __init__(self, theirs: nn.Module, heads: int) -> None:
        super().__init__()
        self.heads, self.ln_1, self.ln_2 = heads, theirs.ln_1, theirs.ln_2
        self.attention, self.out = _linear(theirs.attn.c_attn), _linear(theirs.attn.c_proj)
        self.up, self.down = _linear(theirs.mlp.c_fc), _linear(theirs.mlp.c_proj)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.attention(self.ln_1(x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        gathered = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(gathered.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class NanoGPT(nn.Module):
    """The weights of `theirs` in nanoGPT's form."""

    def __init__(self, theirs: GPT2LMHeadModel) -> None:
        super().__init__()
        model = theirs.transformer
        self.words, self.positions, self.norm = model.wte, model.wpe, model.ln_f
        self.blocks = nn.ModuleList(_Block(block, theirs.config.n_head) for block in model.h)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss of each next token of `ids` (B, T), on average."""
        x = self.words(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.words.weight)[:, :-1]  # (B, T - 1, V)
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def _linear(conv: nn.Module) -> nn.Linear:
    """`conv` keeps its weight the other way round."""
    columns, rows = conv.weight.shape
    linear = nn.Linear(columns, rows)
    linear.weight, linear.bias = nn.Parameter(conv.weight.detach().T.contiguous()), conv.bias
    return linear
