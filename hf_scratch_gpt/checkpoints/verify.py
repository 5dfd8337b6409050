"""Compare a source and what was made of it: `python -m conversion.verify SOURCE OUT`.

Both run on the same random tokens, the source through transformers' GPT-2 and the result through
our model, one layer at a time, so that a model of any size takes little memory.
"""

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.utils import logging

from ..model.blocks_scratch_gpt import LayerNorm, TransformerBlock
from ..model.configuration_scratch_gpt import ScratchGPTConfig
from .assemble import plan
from .commands import run_command
from .direct_io import read_tensor
from .saved import read_saved
from .sources import GPT2Source, StoredTensor

_TOKENS = 8
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")
# float32 sums of a few thousand terms, in another order.
_TOLERANCE = 1e-4


def gpt2_config(config: ScratchGPTConfig) -> GPT2Config:
    """transformers' configuration of the GPT-2 that `config` describes."""
    same = ["vocab_size", "initializer_range", "use_cache", "tie_word_embeddings"]
    same += ["scale_attn_weights", "scale_attn_by_inverse_layer_idx"]
    same += ["bos_token_id", "eos_token_id", "pad_token_id"]
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


def run_layers(
    config: ScratchGPTConfig,
    tensor: Callable[[str], torch.Tensor],
    block: Callable[[int], nn.Module],
    norm: nn.Module,
    names: dict[str, str],
    ids: torch.Tensor,
    shows_progress: bool = False,
) -> torch.Tensor:
    """Logits of `ids`, with two layers' weights in memory at a time.

    Args:
        tensor: gives a tensor by name.
        block: makes layer i, with its weights.
        norm: the final norm, to be given its weights.
        names: of the token and position embedding, the final norm's weight and bias, and the head.
        ids: two texts, (2, T), of which one has the first T positions and one the last.
        shows_progress: draw a bar if it takes more than a second.
    """
    length, positions = ids.shape[1], tensor(names["positions"])
    hidden_states = tensor(names["tokens"])[ids]
    hidden_states += torch.stack([positions[:length], positions[-length:]])
    layers = range(config.num_hidden_layers)
    with ThreadPoolExecutor(1) as pool:  # fetches a layer while the one before is computed
        following = pool.submit(block, 0)
        bar = {"desc": "Comparing", "leave": False, "delay": 1, "disable": not shows_progress}
        for layer in logging.tqdm(layers, **bar):
            fetched = following.result()
            if layer + 1 < len(layers):
                following = pool.submit(block, layer + 1)
            output = fetched(hidden_states)
            hidden_states = output[0] if isinstance(output, tuple) else output
    norm.load_state_dict({"weight": tensor(names["scale"]), "bias": tensor(names["shift"])})
    return norm(hidden_states) @ tensor(names["head"]).T


@torch.no_grad()
def source_logits(source: GPT2Source, dtype: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the source by transformers' GPT2Block, its weights rounded to `dtype`."""
    config = gpt2_config(source.config)
    config._attn_implementation = "sdpa"

    def tensor(name: str) -> torch.Tensor:
        if name not in source.tensors and name.endswith("bias"):
            name_of_weight = name.removesuffix("bias") + "weight"
            shape = source.tensors[name_of_weight].shape
            return torch.zeros(shape[-1] if source.inputs_first else shape[0])
        return source.tensors[name].read().to(dtype).float()

    def block(layer: int) -> nn.Module:
        with torch.device("meta"):
            made = GPT2Block(config, layer_idx=layer).eval()
        state = {}
        for name in made.state_dict():
            if source.textbook:
                pieces = [tensor(piece) for piece in _textbook_names(layer, name)]
                value = torch.cat(pieces)
            else:
                value = tensor(f"h.{layer}.{name}")
            state[name] = value if value.ndim == 1 or source.inputs_first else value.T
        made.load_state_dict(state, assign=True)
        return made

    if source.textbook:
        names = {"tokens": "tok_emb.weight", "positions": "pos_emb.weight"}
        names |= {"scale": "final_norm.scale", "shift": "final_norm.shift"}
    else:
        names = {"tokens": "wte.weight", "positions": "wpe.weight"}
        names |= {"scale": "ln_f.weight", "shift": "ln_f.bias"}
    heads = {"lm_head.weight", "out_head.weight"} & source.tensors.keys()
    names["head"] = heads.pop() if heads else names["tokens"]
    norm = nn.LayerNorm(source.config.hidden_size, source.config.layer_norm_eps)
    return run_layers(source.config, tensor, block, norm, names, ids)


def _textbook_names(layer: int, name: str) -> list[str]:
    """The textbook's names of the parts of transformers' tensor `name` of a block."""
    parts = {
        "ln_1.weight": ["norm1.scale"],
        "ln_1.bias": ["norm1.shift"],
        "ln_2.weight": ["norm2.scale"],
        "ln_2.bias": ["norm2.shift"],
    }
    for gpt2, textbook in (
        ("attn.c_attn", ["att.W_query", "att.W_key", "att.W_value"]),
        ("attn.c_proj", ["att.out_proj"]),
        ("mlp.c_fc", ["ff.layers.0"]),
        ("mlp.c_proj", ["ff.layers.2"]),
    ):
        for kind in ("weight", "bias"):
            parts[f"{gpt2}.{kind}"] = [f"{piece}.{kind}" for piece in textbook]
    return [f"trf_blocks.{layer}.{piece}" for piece in parts[name]]


@torch.no_grad()
def result_logits(
    config: ScratchGPTConfig, stored: dict[str, StoredTensor], ids: torch.Tensor
) -> torch.Tensor:
    """Logits of our model with the tensors `stored`, computed in float32."""
    config._attn_implementation = "sdpa"

    def tensor(name: str) -> torch.Tensor:
        return stored[name].read().float()

    def block(layer: int) -> nn.Module:
        with torch.device("meta"):
            made = TransformerBlock(config, layer_idx=layer).eval()
        prefix = f"model.layers.{layer}."
        state = {name: tensor(prefix + name) for name in made.state_dict()}
        made.load_state_dict(state, assign=True)
        return made

    names = {"tokens": "model.embed_tokens.weight", "positions": "model.embed_positions.weight"}
    names |= {"scale": "model.norm.weight", "shift": "model.norm.bias"}
    names["head"] = "lm_head.weight" if "lm_head.weight" in stored else names["tokens"]
    norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
    return run_layers(config, tensor, block, norm, names, ids, shows_progress=True)


def verify(source: GPT2Source, folder: Path) -> tuple[float, float]:
    """Largest and mean difference of the logits of `source` and of the model saved in `folder`.

    Raises:
        ValueError: they differ by more than rounding or in a size, or `folder` is damaged.
    """
    config, stored = read_saved(folder, read_tensor)
    for name in _SIZES:
        theirs, ours = getattr(source.config, name), getattr(config, name)
        if theirs != ours:
            raise ValueError(
                f"{folder} has {name}={ours}, and {source.path} {theirs}; convert it anew"
            )
    generator = torch.Generator().manual_seed(0)
    length = min(_TOKENS, config.max_position_embeddings)
    ids = torch.randint(0, config.vocab_size, (2, length), generator=generator)
    # Side by side, since most of the time goes into fetching weights.
    with ThreadPoolExecutor(2) as pool:
        theirs = pool.submit(source_logits, source, config.dtype or torch.float32, ids)
        ours = pool.submit(result_logits, config, stored, ids)
        expected, difference = theirs.result(), (ours.result() - theirs.result()).abs()
    largest, mean = difference.max().item(), difference.mean().item()
    limit = _TOLERANCE * max(1.0, expected.abs().max().item())
    if not largest <= limit:
        raise ValueError(
            f"{folder}: logits differ from the source's by {largest:.3g}, more than {limit:.3g}; "
            "the conversion is wrong"
        )
    return largest, mean


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    from .convert import add_source_arguments, open_source

    parser = argparse.ArgumentParser(prog="python -m conversion.verify", description=__doc__)
    add_source_arguments(parser)
    parser.add_argument("out", help="the saved model")
    options = parser.parse_args(arguments)

    def work() -> None:
        source = open_source(options)
        plan(source)  # tells what is missing or misshapen
        largest, mean = verify(source, Path(options.out))
        print(f"logits differ by {largest:.3g} at most, by {mean:.3g} on average")

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
