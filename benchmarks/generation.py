"""Writing and reading: one text, a long prompt, several texts at once."""

import copy
import functools
import gc
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from hf_scratch_gpt import ScratchGPTConfig, ScratchGPTForCausalLM, optimize_for_generation

from .peers import DTYPES, OURS, Write, load, refusal, writers
from .timing import in_turns, matrix_peak, rates, read_bandwidth, seconds_of

# How far below the best token's score a written one's may be on average, in spreads of the scores.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.02, "int8": 0.02}
_CHECKED = 4  # texts; all would take longer than to write them
_TOO_SLOW = 10  # times the median of all; such a way is left out


def limit(folder: Path, weights: str, device: str, texts: int, prompt: int, written: int) -> float:
    """The least seconds: matrices read at memory's speed, or multiplied at the processor's.

    Greedy search of ours reads less than all of the head.
    """
    with torch.device("meta"):
        model = ScratchGPTForCausalLM(ScratchGPTConfig.from_preset(folder.name))
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    numbers = sum(linear.weight.numel() for linear in linears)
    size = {"float32": 4, "bfloat16": 2, "int8": 1}[weights]
    # int8 is multiplied by integers of 16 bits, twice as many as floats at a time.
    peak = matrix_peak(DTYPES.get(weights, torch.float32), device) * (1 + (weights == "int8"))
    read, flops = size * numbers / read_bandwidth(device), 2 * numbers * texts
    of_prompt = 2 * (numbers - model.lm_head.weight.numel()) * texts * prompt / peak
    return of_prompt + (written - 1) * max(read, flops / peak)


@torch.no_grad()
def gap(ids: torch.Tensor, written: list[list[int]], reference: PreTrainedModel) -> float:
    """How far below the best tokens' scores those of `written` are, by `reference` in float32.

    Two ways to round may take one token or another where these are as good, and the texts part.
    So each token is looked at by itself, after those that were written before it. The mean, in
    spreads of the scores.
    """
    text = torch.tensor(written)
    whole = torch.cat([ids, text], dim=1).to(reference.device)
    logits = reference(whole).logits[:, ids.shape[1] - 1 : -1]
    chosen = logits.gather(-1, text.to(reference.device)[..., None])[..., 0]
    return float(((logits.amax(-1) - chosen) / logits.std(-1)).mean())


Tried = tuple[dict[str, Write], dict[str, float], list[str]]
_tried: dict[tuple[Any, ...], Tried] = {}  # one, as they take gigabytes


def tried(*given: Any) -> Tried:
    """As `_try`, anew only for others; the last ones have ended by then."""
    if given not in _tried:
        _tried.clear()
        gc.collect()
        _tried[given] = _try(*given)
    return _tried[given]


def _try(folder: Path, weights: str, device: str, openvino: str | None) -> Tried:
    """Ways to write that are worth their time, seconds of their first calls, and what is not.

    Each writes two tokens after two texts, if it takes two, twice: the first call prepares.
    """
    ways, left_out = writers(folder, weights, device, openvino)
    ids = torch.randint(0, 50257, (2, 32), generator=torch.Generator().manual_seed(1))
    firsts: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for name, write in ways.items():
        trial = partial(write, ids[:1] if refusal(name, 2, 34) else ids, 2)
        try:
            firsts[name] = seconds_of(trial, device)
            seconds[name] = seconds_of(trial, device)
            print(
                f"  {name}: first call {firsts[name]:.2f} s, then {seconds[name]:.2f}", flush=True
            )
        except (BrokenProcessPool, RuntimeError) as error:
            left_out.append(f"{name} ({error})")
    most = _TOO_SLOW * median(seconds.values())
    left_out += [
        f"{name} ({taken / most * _TOO_SLOW:.0f} times the median)"
        for name, taken in seconds.items()
        if taken > most
    ]
    kept = {name: write for name, write in ways.items() if seconds.get(name, most + 1) <= most}
    return kept, firsts, left_out


@functools.cache
def reference_of(folder: Path, device: str) -> PreTrainedModel:
    """What writers are checked by: `GPT2LMHeadModel` in float32."""
    return load(folder, "float32", device)[0]


def writing(
    folder: Path,
    weights: str,
    rounds: int,
    device: str,
    openvino: str | None,
    texts: int,
    prompt: int,
    written: int,
) -> dict[str, Any]:
    """Tokens a second: those written, or, if only one is written, those of the prompt."""
    ids = torch.randint(0, 50257, (texts, prompt), generator=torch.Generator().manual_seed(0))
    ways, firsts, left_out = tried(folder, weights, device, openvino)
    refusals = {name: refusal(name, texts, prompt + written) for name in ways}
    ways = {name: way for name, way in ways.items() if refusals[name] is None}
    left_out = left_out + [f"{name} ({why})" for name, why in refusals.items() if why]
    texts_of: dict[str, list[list[int]]] = {}

    def call(name: str) -> None:
        texts_of[name] = ways[name](ids, written)

    seconds = in_turns({name: partial(call, name) for name in ways}, rounds, device)
    reference = reference_of(folder, device)
    for name, text in texts_of.items():
        off = gap(ids[:_CHECKED], text[:_CHECKED], reference)
        if not off < TOLERANCE[weights]:  # or it is NaN
            said = f"{name} (writes other tokens than GPT2LMHeadModel, {off:.2g} spreads below)"
            assert name not in OURS, said
            left_out.append(said)
            del seconds[name]
    amount = texts * (prompt if written == 1 else written)
    return {
        "unit": "tokens/s",
        "rates": rates(amount, seconds),
        "limit": amount / limit(folder, weights, device, texts, prompt, written),
        "first call, s": {name: firsts[name] for name in ways},
        "left out": left_out,
    }


def requests(folder: Path, rounds: int, device: str, count: int = 64) -> dict[str, Any]:
    """Tokens a second of many prompts of 8 to 64 tokens, 32 tokens each, in bfloat16 on a GPU.

    By transformers' continuous batching, and by `generate` of all at once, padded on the left.
    """
    dtype = "float32" if device == "cpu" else "bfloat16"
    theirs, ours = load(folder, dtype, device)
    lengths = torch.randint(8, 65, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [(torch.arange(length) * 997 % 50257).tolist() for length in lengths]
    longest = max(lengths)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    fast = optimize_for_generation(copy.deepcopy(ours))
    config = GenerationConfig(max_new_tokens=32, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def at_once(model: PreTrainedModel) -> list[list[int]]:
        given = dict(attention_mask=mask.long().to(device), generation_config=config)
        return model.generate(ids.to(device), **given)[:, longest:].tolist()

    def continuous(model: PreTrainedModel) -> list[list[int]]:
        answers = model.generate_batch(prompts, config).values()
        written = {tuple(answer.prompt_ids): answer.generated_tokens for answer in answers}
        return [written[tuple(prompt)] for prompt in prompts]

    texts_of: dict[str, torch.Tensor] = {}

    def call(name: str, way: Callable[..., list[list[int]]], model: PreTrainedModel) -> None:
        texts_of[name] = torch.tensor(way(model))

    calls: dict[str, Callable[[], None]] = {}
    for name, model in {"GPT2LMHeadModel": theirs, OURS[0]: ours, OURS[1]: fast}.items():
        calls[name] = partial(call, name, at_once, model)
        by_batches = f"{name}, continuous batching"
        calls[by_batches] = partial(call, by_batches, continuous, model)
    seconds = in_turns(calls, rounds, device)
    for name, texts in texts_of.items():  # where two tokens are as good, texts part
        assert (texts == texts_of[OURS[0]]).float().mean() > 0.9, f"{name} writes other tokens"
    return {
        "unit": "tokens/s",
        "rates": rates(count * 32, seconds),
        "left out": ["vLLM (it wants an older transformers)"],
    }
