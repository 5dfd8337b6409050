"""Compare a source and what was made of it.

Both run on the same random tokens, the source through transformers' GPT-2 and the result through
our model. Each module has weights only while it computes, so that a model of any size takes little
memory. Nothing here uses the table of names that the conversion applies, so a mistake in our names
or in the order of query, key and value shows.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.utils import logging

from ..model.configuration_scratch_gpt import ScratchGPTConfig
from ..model.modeling_scratch_gpt import ScratchGPTForCausalLM
from .saved import read_saved
from .sources import TOKENS, GPT2Source

_NUM_TOKENS = 8
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")
# float32 sums of a few thousand terms, in another order.
_TOLERANCE = 1e-4


def gpt2_config(config: ScratchGPTConfig) -> GPT2Config:
    """transformers' configuration of the GPT-2 that `config` describes."""
    same = ["vocab_size", "initializer_range", "use_cache", "tie_word_embeddings", *TOKENS]
    same += ["scale_attn_weights", "scale_attn_by_inverse_layer_idx"]
    return GPT2Config(
        **{name: getattr(config, name) for name in same},
        n_embd=config.hidden_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_positions=config.max_position_embeddings,
        n_inner=config.intermediate_size,
        activation_function=config.hidden_act,
        layer_norm_epsilon=config.layer_norm_eps,
        embd_pdrop=config.embedding_dropout,
        resid_pdrop=config.hidden_dropout,
        attn_pdrop=config.attention_dropout,
    )


def verify(source: GPT2Source, folder: Path) -> tuple[float, float]:
    """Largest and mean difference of the logits of `source` and of the model saved in `folder`.

    Raises:
        ValueError: they differ by more than rounding or in a size, or `folder` is damaged.
    """
    config, stored = read_saved(folder)
    for name in _SIZES:
        theirs, ours = getattr(source.config, name), getattr(config, name)
        if theirs != ours:
            raise ValueError(
                f"{folder} has {name}={ours}, and {source.path} {theirs}; convert it anew"
            )
    dtype = config.dtype or torch.float32

    def read_theirs(name: str) -> torch.Tensor:
        return _source_tensor(source, name.removeprefix("transformer.")).to(dtype).float()

    def read_ours(name: str) -> torch.Tensor:
        is_tied = name == "lm_head.weight" and name not in stored
        return stored["model.embed_tokens.weight" if is_tied else name].read().float()

    # Side by side, since most of the time goes into fetching weights.
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(_logits, GPT2LMHeadModel, gpt2_config(source.config), read_theirs)
        logits = _logits(ScratchGPTForCausalLM, config, read_ours, shows_progress=True)
        expected = future.result()
    difference = (logits - expected).abs()
    largest, mean = difference.max().item(), difference.mean().item()
    limit = _TOLERANCE * max(1.0, expected.abs().max().item())
    if not largest <= limit:
        raise ValueError(
            f"{folder}: logits differ from the source's by {largest:.3g}, more than {limit:.3g}; "
            "the conversion is wrong"
        )
    return largest, mean


def _source_tensor(source: GPT2Source, name: str) -> torch.Tensor:
    """What transformers' GPT-2 calls `name`, in its layout, out of `source`."""
    if name not in source.tensors:
        if name == "lm_head.weight":
            return _source_tensor(source, "wte.weight")
        weight = _source_tensor(source, name.removesuffix("bias") + "weight")
        return torch.zeros(weight.shape[-1])
    values = source.tensors[name].read()
    outputs_first = values.ndim == 2 and name.startswith("h.") and not source.inputs_first
    return values.T if outputs_first else values


@torch.no_grad()
def _logits(
    model_class: type[PreTrainedModel],
    config: Any,
    read: Callable[[str], torch.Tensor],
    shows_progress: bool = False,
) -> torch.Tensor:
    """Logits (2, T, V) of random tokens, at the first T positions and at the last T.

    `read` gives a tensor of the model by its name, in float32.
    """
    with torch.device("meta"):
        model = model_class(config).float().eval()
    model.set_attn_implementation("sdpa")
    leaves = {name: module for name, module in model.named_modules() if module._parameters}
    bar = logging.tqdm(
        total=len(leaves), desc="Comparing", leave=False, delay=1, disable=not shows_progress
    )
    for name, leaf in leaves.items():

        def fetch(module: torch.nn.Module, inputs: object, name: str = name) -> None:
            state = {kind: read(f"{name}.{kind}") for kind in module.state_dict()}
            module.load_state_dict(state, assign=True)

        def forget(module: torch.nn.Module, inputs: object, output: object) -> None:
            module.to("meta")
            bar.update(1)

        leaf.register_forward_pre_hook(fetch)
        leaf.register_forward_hook(forget)
    length = min(_NUM_TOKENS, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (2, length), generator=generator)
    first = torch.arange(length)
    positions = torch.stack([first, first + config.max_position_embeddings - length])
    with bar:
        return model(ids, position_ids=positions, use_cache=False).logits
