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

from ..model.configuration_scratch_gpt import ScratchGPTConfig
from ..model.modeling_scratch_gpt import ScratchGPTForCausalLM
from ..model.presets_scratch_gpt import GELU_FORMS
from .saved import read_saved
from .sources import GPT2Source

_NUM_TOKENS = 8
# What has to agree, by GPT-2's names; a small difference of the activation may hide in rounding.
_AGREEING = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "activation_function"]
_AGREEING += ["layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"]
# float32 sums of a few thousand terms, in another order.
_TOLERANCE = 1e-4


def gpt2_config(config: ScratchGPTConfig) -> GPT2Config:
    """transformers' configuration of the GPT-2 that `config` describes."""
    names = [name for name in GPT2Config.__annotations__ if hasattr(config, name)]
    fields = {name: getattr(config, name) for name in names}
    fields["tokenizer_class"] = getattr(config, "tokenizer_class", None)
    # Tools of others read `n_ctx`, as OpenAI's own files have it; transformers does not.
    return GPT2Config(**fields, n_ctx=config.max_position_embeddings)


def verify(source: GPT2Source, folder: Path) -> str:
    """Compare the logits of `source` and of the model saved in `folder`; how far they differ.

    Raises:
        RuntimeError: they differ by more than rounding, or in a size.
        ValueError: `folder` is damaged.
    """
    config, stored = read_saved(folder)
    for name in _AGREEING:
        theirs, ours = getattr(source.theirs, name), getattr(config, name)
        if GELU_FORMS.get(theirs, theirs) != GELU_FORMS.get(ours, ours):
            difference = f"{folder} has {name}={ours}, and {source.path} {theirs}"
            raise RuntimeError(f"{difference}; convert it anew")
    dtype = config.dtype or torch.float32

    def read_theirs(name: str) -> torch.Tensor:
        return _source_tensor(source, name.removeprefix("transformer.")).to(dtype).float()

    def read_ours(name: str) -> torch.Tensor:
        # Nothing but a tied head is not stored.
        return stored[name if name in stored else "model.embed_tokens.weight"].read().float()

    # Side by side, since most of the time goes into fetching weights.
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(_logits, GPT2LMHeadModel, source.theirs, read_theirs)
        logits = _logits(ScratchGPTForCausalLM, config, read_ours)
        expected = future.result()
    differences = (logits - expected).abs()
    largest, mean = differences.max().item(), differences.mean().item()
    limit = _TOLERANCE * max(1.0, expected.abs().max().item())
    if not largest <= limit:
        raise RuntimeError(
            f"{folder}: logits differ from the source's by {largest:.3g}, more than {limit:.3g}; "
            "the conversion is wrong"
        )
    return f"logits differ by {largest:.2g} at most, {mean:.2g} on average"


def _source_tensor(source: GPT2Source, name: str) -> torch.Tensor:
    """What transformers' GPT-2 calls `name`, in its layout, out of `source`."""
    if name == "lm_head.weight" and name not in source.tensors:
        name = "wte.weight"
    if name not in source.tensors:  # a bias
        return torch.zeros(_source_tensor(source, name[:-4] + "weight").shape[-1])
    values = source.tensors[name].read()
    outputs_first = values.ndim == 2 and name.startswith("h.") and not source.inputs_first
    return values.T if outputs_first else values


@torch.no_grad()
def _logits(
    model_class: type[PreTrainedModel], config: Any, read: Callable[[str], torch.Tensor]
) -> torch.Tensor:
    """Logits (2, T, V) of random tokens, at the first T positions and at the last T.

    `read` gives a tensor of the model by its name, in float32.
    """
    with torch.device("meta"):
        model = model_class(config).float().eval()
    model.set_attn_implementation("sdpa")
    names = {module: name for name, module in model.named_modules()}

    def fetch(module: torch.nn.Module, inputs: object) -> None:
        state = {kind: read(f"{names[module]}.{kind}") for kind, _ in module.named_parameters()}
        module.load_state_dict(state, assign=True)

    def forget(module: torch.nn.Module, inputs: object, output: object) -> None:
        module.to("meta")

    for module in model.modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_pre_hook(fetch)
            module.register_forward_hook(forget)
    length = min(_NUM_TOKENS, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (2, length), generator=generator)
    first = torch.arange(length)
    positions = torch.stack([first, first + config.max_position_embeddings - length])
    return model(ids, position_ids=positions, use_cache=False).logits
