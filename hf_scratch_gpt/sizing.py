"""How large a model is and what it costs: arithmetic on a configuration, nothing is built.

Parameters are exact. FLOPs are those of the matrix products; a multiplication and an addition count
as two. Memory is that of the tensors that are alive at the same time.
"""

# B batch, T tokens of a text, C hidden, I feed-forward, H heads, V vocabulary, L blocks

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .model.presets_scratch_gpt import GELU_FORMS, check_sizes, find_preset

if TYPE_CHECKING:  # they import torch, which takes seconds
    from .model.configuration_scratch_gpt import ScratchGPTConfig

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


def preset_sizes(name: str, **overrides: Any) -> Any:
    """What the functions of this file read of the published size called `name`, at once.

    Args:
        overrides: fields that differ from it.

    Raises:
        ValueError: no preset has that name, or the sizes do not fit.
    """
    switches = dict(model_type="scratch_gpt", fused_kernels=True, chunked_loss=False)
    fields = {**find_preset(name), **switches, **overrides}
    fields.setdefault("intermediate_size", 4 * fields["hidden_size"])
    check_sizes(fields)
    return SimpleNamespace(**fields)


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters by component.

    Args:
        token_embedding, position_embedding: a vector of C for each token id, each position.
        attention, feed_forward: the projections of all blocks, four and two in each.
        norms: scales and shifts of two LayerNorms a block and of the last one.
        output_head: V * C, or 0 if it shares the token embedding's weights.
    """

    token_embedding: int
    position_embedding: int
    attention: int
    feed_forward: int
    norms: int
    output_head: int

    @property
    def total(self) -> int:
        """All parameters, shared ones once."""
        return self.tied_total + self.output_head

    @property
    def tied_total(self) -> int:
        """All parameters where the output head shares the token embedding's weights."""
        embeddings = self.token_embedding + self.position_embedding
        return embeddings + self.attention + self.feed_forward + self.norms

    @property
    def untied_total(self) -> int:
        """All parameters where the output head has weights of its own."""
        return self.tied_total + self.token_embedding


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that one step of training takes.

    Args:
        weights, gradients, moments: one, one and two numbers for each parameter.
        activations: what the forward pass keeps for the backward pass, the loss apart.
        loss: log-probabilities and gradients, each as large as the logits, (B, T, V).
        peak: the most that lives at one time; less than the sum, as gradients replace activations.
    """

    weights: int
    gradients: int
    moments: int
    activations: int
    loss: int
    peak: int


def count_parameters(config: "ScratchGPTConfig") -> ParameterCounts:
    """Count the parameters of a `ScratchGPTForCausalLM` of this configuration.

    The shapes are those of Radford et al. 2019, section 2.3, on Vaswani et al. 2017, sections 3.2
    and 3.3: a projection from A to B has A * B weights and B biases; the head has no bias.

    Raises:
        ValueError: the configuration is of another model, as for all functions here.
    """
    hidden, inner = config.hidden_size, _inner(config)
    token_embedding = config.vocab_size * hidden
    projections = 4 * hidden * hidden + hidden + (3 * hidden if config.qkv_bias else 0)
    return ParameterCounts(
        token_embedding=token_embedding,
        position_embedding=config.max_position_embeddings * hidden,
        attention=config.num_hidden_layers * projections,
        feed_forward=config.num_hidden_layers * (2 * hidden * inner + inner + hidden),
        norms=(2 * config.num_hidden_layers + 1) * 2 * hidden,
        output_head=0 if config.tie_word_embeddings else token_embedding,
    )


def storage_bytes(parameters: int, dtype: str = "float32") -> int:
    """Bytes of `parameters` numbers in `dtype`, one of `BYTES`; int8 without its scales."""
    if dtype not in BYTES:
        raise ValueError(f"dtype={dtype!r} is not known here; give one of {', '.join(BYTES)}")
    return parameters * BYTES[dtype]


def kv_cache_bytes(config: "ScratchGPTConfig", tokens: int = 1, dtype: str = "float32") -> int:
    """Bytes of the keys and values in `dtype` that generation keeps for `tokens` of one text.

    Each block keeps a key and a value of C numbers a token (Shazeer 2019, section 2.4).
    """
    numbers = 2 * _ours(config).num_hidden_layers * config.hidden_size * tokens
    return storage_bytes(numbers, dtype)


def forward_flops_per_token(config: "ScratchGPTConfig", length: int | None = None) -> int:
    """FLOPs of the matrix products for one token of a text of `length` tokens, on average.

    A weight takes 2 FLOPs a token, the embeddings none (Kaplan et al. 2020, section 2.1 and table
    1). Scores and weighted sums take 2 * T * C each in a block: all T keys count for every token,
    though causal attention needs half of them (as in Chowdhery et al. 2022, appendix B).

    Args:
        length: T; the model's positions if not given.

    Raises:
        ValueError: `length` is below 1 or above the model's positions.
    """
    length = _checked_length(config, length)
    hidden, inner = config.hidden_size, _inner(config)
    block = 4 * hidden * hidden + 2 * hidden * inner + 2 * length * hidden
    return 2 * (config.num_hidden_layers * block + config.vocab_size * hidden)


def training_flops_per_token(config: "ScratchGPTConfig", length: int | None = None) -> int:
    """FLOPs of the matrix products, forward and backward, for one token on average.

    Three times the forward pass: each product X W has a gradient with respect to X and one with
    respect to W, of the same size (Kaplan et al. 2020, section 2.1). Scores that a fused kernel
    computes again do not count.

    Args:
        length: T, as in `forward_flops_per_token`.
    """
    return 3 * forward_flops_per_token(config, length)


def rule_of_thumb_flops_per_token(config: "ScratchGPTConfig") -> int:
    """FLOPs of training for one token by the rule of thumb of published figures: 6 N.

    N is all parameters, as in Brown et al. 2020, appendix D; attention's scores do not count.
    """
    return 6 * count_parameters(config).total


def training_seconds(flops_per_token: float, tokens: float, flops_per_second: float) -> float:
    """Seconds to train on `tokens` at `flops_per_token`, by a device of `flops_per_second`.

    GPT-3's 3.14e23 FLOPs (Brown et al. 2020, table D.1) at 28e12 FLOP/s take 355 years.

    Raises:
        ValueError: `tokens` or `flops_per_second` is not above 0, or not finite.
    """
    for name, value in {"tokens": tokens, "flops_per_second": flops_per_second}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} is not a finite number above 0; give one")
    return flops_per_token * tokens / flops_per_second


def humanize_seconds(seconds: float) -> str:
    """`seconds` in the largest unit that they reach, "355.4 years"; a year has 365.25 days."""
    units = {"years": 365.25 * 86400, "days": 86400, "hours": 3600, "minutes": 60}
    for unit, size in units.items():
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} seconds"


def training_memory(
    config: "ScratchGPTConfig",
    batch_size: int = 1,
    length: int | None = None,
    attention: str = "sdpa",
    checkpointing: bool = False,
) -> TrainingMemory:
    """Bytes of a step of AdamW in float32 after the first, which starts without moments.

    The terms are those of the plain model, without a key-value cache, and of torch 2.13 on a CPU,
    where a dropout's mask takes four bytes a number and torch's attention kernel has no dropout.
    Only tensors count: by glibc's default settings a process takes 5 to 40 % more. For models of
    one or two blocks the terms may be off by a seventh.

    Args:
        batch_size: B, texts in a step.
        length: T, tokens of a text; the model's positions if not given.
        attention: transformers' `attn_implementation`, "sdpa" or "eager".
        checkpointing: keep only each block's input and compute the block again in the backward
            pass (Chen et al. 2016, section 4).

    Raises:
        ValueError: a size is out of its range, or the attention is another.
    """
    length = _checked_length(config, length)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is below 1; give a positive number")
    if attention not in ("eager", "sdpa"):
        raise ValueError(f"attention={attention!r} is not known here; give 'eager' or 'sdpa'")
    sizes = _tensors_of_a_step(config, batch_size, length, attention)
    kept = config.num_hidden_layers * sizes["hidden" if checkpointing else "block"]
    kept += sizes["ends"] + sizes["norm"]
    total = count_parameters(config).total
    return TrainingMemory(
        weights=4 * total,
        gradients=4 * total,
        moments=8 * total,
        activations=4 * kept,
        loss=4 * sizes["loss"],
        peak=4 * (3 * total + _fullest_moment(config, sizes, kept, checkpointing)),
    )


def _fullest_moment(
    config: "ScratchGPTConfig", sizes: dict[str, int], kept: int, checkpointing: bool
) -> int:
    """The most numbers alive at one time, apart from the weights and AdamW's moments.

    That is in the backward pass of the loss, the head, the last block, or the first, when all other
    gradients exist; or in the update of one matrix, with a root and a quotient beside it, for the
    positions also the tokens' quotient.
    """
    counts, hidden, block = count_parameters(config), sizes["hidden"], sizes["block"]
    head = counts.token_embedding
    largest = max(head, counts.position_embedding, config.hidden_size * _inner(config))
    first = (counts.attention + counts.feed_forward) // config.num_hidden_layers
    # What came after a block's scores is freed before their gradients.
    working = 2 * hidden + max(
        sizes["gradients of the activation"] - sizes["norm"],
        sizes["gradients of the scores"] - sizes["feed_forward"] - 2 * sizes["norm"],
    )
    return max(
        kept + sizes["loss"],
        kept + sizes["gradient of the logits"] + head + hidden,
        kept + (block - hidden if checkpointing else 0) + head + working,
        counts.tied_total - counts.position_embedding - first + block + sizes["ends"] + working,
        counts.total + max(2 * largest, head + 2 * counts.position_embedding),
    )


def _tensors_of_a_step(
    config: "ScratchGPTConfig", batch_size: int, length: int, attention: str
) -> dict[str, int]:
    """How many numbers each part keeps for the backward pass, or makes in it."""
    tokens = batch_size * length
    hidden, inner = tokens * config.hidden_size, tokens * _inner(config)  # (B, T, C), (B, T, I)
    heads, logits = tokens * config.num_attention_heads, tokens * config.vocab_size
    drops, fused = config.attention_dropout > 0, config.fused_kernels
    kernel = attention == "sdpa" and not drops
    scores = 0 if kernel else heads * length  # (B, H, T, T)
    mask = hidden if config.hidden_dropout > 0 else 0
    # Input, output, mean and deviation; written out: centred twice, scaled, output and deviation.
    norm = 2 * hidden + 2 * tokens if fused else 4 * hidden + tokens
    factors = {"tanh": 3, "none": 2}.get(GELU_FORMS.get(config.hidden_act, ""), 0)
    # Log-probabilities, their gradient, that of the logits, which are freed before the backward
    # pass; in pieces: the gradient of the head twice, that of its inputs, and a piece of both.
    loss, logits_gradient = 3 * logits, logits
    if config.chunked_loss:
        from .model.modeling_scratch_gpt import LOSS_PIECE

        piece = min(tokens, LOSS_PIECE) * (config.vocab_size + config.hidden_size)
        loss = 2 * config.vocab_size * config.hidden_size + hidden + piece
        logits_gradient = 0
    # Query, key, value, gathered; weights, with dropout's mask and result; the kernel's sums.
    attended = 4 * hidden + mask + scores * (3 if drops else 1) + (heads if kernel else 0)
    feed_forward = (2 if fused else 2 + factors) * inner + mask
    return {
        "hidden": hidden,
        "norm": norm,
        "feed_forward": feed_forward,
        "block": 2 * norm + attended + feed_forward,
        "ends": hidden if config.embedding_dropout > 0 else 0,
        "loss": loss,
        "gradient of the logits": logits_gradient,
        "gradients of the activation": inner if fused else 2 * inner,
        # Of the weights and the scores, and the mask of the future.
        "gradients of the scores": scores * (1 if drops else 2)
        + (tokens * length if attention == "eager" else 0),
    }


def _ours(config: "ScratchGPTConfig") -> "ScratchGPTConfig":
    if config.model_type != "scratch_gpt":
        raise ValueError(
            f"{type(config).__name__} is not a ScratchGPTConfig, whose shapes are known here; make "
            "the model on the device meta and add up its parameters"
        )
    return config


def _inner(config: "ScratchGPTConfig") -> int:
    inner = _ours(config).intermediate_size
    assert inner is not None, "the configuration derives it"
    return inner


def _checked_length(config: "ScratchGPTConfig", length: int | None) -> int:
    limit = config.max_position_embeddings
    if length is not None and not 1 <= length <= limit:
        raise ValueError(
            f"length={length} is not between 1 and the model's {limit} positions; give another"
        )
    return limit if length is None else length
