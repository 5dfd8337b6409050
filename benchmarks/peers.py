"""What people run GPT-2 with, each brought to one form: a prompt's ids in, new ids out."""

import copy
import functools
import importlib.util
import json
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import numpy
import torch
from transformers import CompileConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from hf_scratch_gpt import ScratchGPTConfig, ScratchGPTForCausalLM
from hf_scratch_gpt.checkpoints.verify import gpt2_config
from hf_scratch_gpt.engine.half import is_slow
from hf_scratch_gpt.engine.swap import optimize_for_generation

from . import by_openvino
from .gguf_file import write_gguf

OURS = ("ours, plain", "ours, fast")
COMPILED, LLAMA = "GPT2LMHeadModel, compiled", "llama.cpp"
_COMPILED_LENGTH = 96  # tokens of its static cache; another length is compiled anew
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Takes ids (B, T) and how many to write; returns those, (B, N).
Write = Callable[[torch.Tensor, int], list[list[int]]]


def make_weights(folder: Path, preset: str) -> None:
    """Save a random GPT-2 in transformers' format."""
    if (folder / "model.safetensors").exists():
        return
    torch.manual_seed(0)
    config: GPT2Config = gpt2_config(ScratchGPTConfig.from_preset(preset))
    model = GPT2LMHeadModel(config)
    # Larger than at the start, so that tokens differ in probability and whoever leaves a bias or a
    # norm out writes others.
    for name, parameter in model.named_parameters():
        is_scale = "ln_" in name and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(is_scale), std=0.06)
    model.save_pretrained(folder)


def by_generate(model: PreTrainedModel, **arguments: object) -> Write:
    """`generate`, greedily."""

    def write(ids: torch.Tensor, count: int) -> list[list[int]]:
        ids = ids.to(model.device)
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            **arguments,
        )
        return whole[:, ids.shape[1] :].tolist()

    return write


def by_fast_generate(model: PreTrainedModel, weights: str | None = None) -> Write:
    """`generate` of `model`, optimized in the first call, so that its time shows there."""
    prepare = functools.cache(lambda: by_generate(optimize_for_generation(model, weights)))
    return lambda ids, count: prepare()(ids, count)


def in_our_format(folder: Path) -> Path:
    """The folder of the same weights in our format, written if it is not there."""
    own = folder.parent / f"{folder.name}-ours"
    if not own.exists():
        ScratchGPTForCausalLM.from_pretrained(folder).save_pretrained(own)
    return own


def load(folder: Path, dtype: str, device: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """transformers' model and ours, on the same weights."""
    classes = (GPT2LMHeadModel, ScratchGPTForCausalLM)
    theirs, ours = (
        model_class.from_pretrained(folder, dtype=DTYPES[dtype]).eval().to(device)
        for model_class in classes
    )
    for model in (theirs, ours):
        model.generation_config.eos_token_id = None  # all write as much as they are asked for
    return theirs, ours


def writers(
    folder: Path, weights: str, device: str, openvino: str | None
) -> tuple[dict[str, Write], list[str]]:
    """All ways to write with the weights in `folder`, kept as "float32", "bfloat16" or "int8".

    And what is left out, and why. `openvino` is the interpreter of OpenVINO's environment.
    """
    dtype = "float32" if weights == "int8" else weights
    theirs, ours = load(folder, dtype, device)
    fast = by_fast_generate(copy.deepcopy(ours), "int8" if weights == "int8" else None)
    ways: dict[str, Write] = {}
    if weights != "int8":
        ways = {"GPT2LMHeadModel": by_generate(theirs), OURS[0]: by_generate(ours)}
        if device != "cpu" or not is_slow(DTYPES[dtype]):  # it compiles for most of a minute
            ways[COMPILED] = by_compiled_generate(theirs)
    ways[OURS[1]] = fast
    if device != "cpu":
        return ways, []
    left_out = []
    if not importlib.util.find_spec("ctranslate2"):
        left_out.append("CTranslate2 (not installed)")
    elif weights == "bfloat16":
        left_out.append("CTranslate2 (refuses bfloat16 on a CPU)")
    else:
        ways["CTranslate2"] = by_ctranslate2(folder, weights)
    if not (importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf")):
        left_out.append(f"{LLAMA} (llama-cpp-python and gguf are not installed)")
    else:
        ways[LLAMA] = by_llama_cpp(folder, weights)
    if openvino is None:
        left_out.append("OpenVINO (--openvino names the interpreter of its environment)")
    else:
        try:
            write = by_openvino.start(openvino, folder, weights, torch.get_num_threads())
            ways["OpenVINO"] = lambda ids, count: write(ids.tolist(), count)
        except RuntimeError as error:
            left_out.append(f"OpenVINO ({error})")
    return ways, left_out


def refusal(name: str, texts: int, length: int) -> str | None:
    """Why the way of this name does not write so many texts, of so many tokens with their prompts.

    None if it does.
    """
    if name == LLAMA and texts > 1:
        return "this binding of it takes one text"
    if name == COMPILED and (texts > 1 or length > _COMPILED_LENGTH):
        return "compiled for one short text only"
    return None


def by_compiled_generate(model: PreTrainedModel) -> Write:
    """`generate` of a copy of `model`, compiled, with a static cache; it takes one short text."""
    mode = "default" if model.device.type == "cpu" else "reduce-overhead"
    compiled = CompileConfig(fullgraph=True, mode=mode)
    compiled._compile_all_devices = True
    static = dict(
        cache_implementation="static", max_cache_len=_COMPILED_LENGTH, compile_config=compiled
    )
    return by_generate(copy.deepcopy(model), **static)


def by_ctranslate2(folder: Path, weights: str) -> Write:
    """CTranslate2 on a conversion of `folder`, in a process of its own.

    By itself it multiplies by MKL on Intel's processors and by oneDNN on others, which is best.
    """
    from ctranslate2.converters import TransformersConverter

    converted = folder.parent / f"{folder.name}-ctranslate2-{weights}"
    if not converted.exists():
        with tempfile.TemporaryDirectory() as named:
            add_vocabulary(folder, Path(named))
            TransformersConverter(named).convert(str(converted), quantization=weights)
    return in_own_process(_start_ctranslate2, str(converted), weights, torch.get_num_threads())


def in_own_process(start: Callable[..., None], *arguments: object) -> Write:
    """What `start`, called there, leaves in `_write`; an error if that process ends."""
    pool = ProcessPoolExecutor(1, get_context("spawn"), start, arguments)
    with suppress(BrokenProcessPool):  # the call that follows says so again
        pool.submit(int).result()  # a first call is timed without its start
    return lambda ids, count: pool.submit(_call_write, ids.tolist(), count).result()


_write: Callable[[list[list[int]], int], list[list[int]]]  # of a process of its own


def _call_write(ids: list[list[int]], count: int) -> list[list[int]]:
    return _write(ids, count)


def _start_ctranslate2(converted: str, weights: str, threads: int) -> None:
    global _write
    import ctranslate2

    generator = ctranslate2.Generator(converted, compute_type=weights, intra_threads=threads)

    def write(ids: list[list[int]], count: int) -> list[list[int]]:
        results = generator.generate_batch(
            [[f"<{number}>" for number in row] for row in ids],
            max_length=count,
            min_length=count,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]

    _write = write


def add_vocabulary(folder: Path, named: Path) -> None:
    """Make `named` the model in `folder` with names for its tokens, which CTranslate2 asks for."""
    for file in folder.iterdir():
        (named / file.name).symlink_to(file.resolve())
    last = ScratchGPTConfig.from_pretrained(folder).vocab_size - 1
    vocabulary = {f"<{number}>": number for number in range(last)} | {"<|endoftext|>": last}
    (named / "vocab.json").write_text(json.dumps(vocabulary))
    (named / "merges.txt").write_text("#version: 0.2\n")


def by_llama_cpp(folder: Path, weights: str) -> Write:
    """llama.cpp, with flash attention, on a GGUF file made of `folder`; it takes one text.

    It is given a process of its own: on some processors it crashes.
    """
    kind = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}[weights]
    path = folder.parent / f"{folder.name}-{kind}.gguf"
    if not path.exists():
        write_gguf(folder, path, kind)
    return in_own_process(_start_llama_cpp, str(path), torch.get_num_threads())


def _start_llama_cpp(path: str, threads: int) -> None:
    global _write
    import llama_cpp

    llama = llama_cpp.Llama(
        path,
        n_ctx=1024,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=True,
        verbose=False,
    )

    def write(ids: list[list[int]], count: int) -> list[list[int]]:
        llama.reset()
        llama.eval(ids[0])
        written: list[int] = []
        while True:
            logits = numpy.ctypeslib.as_array(llama._ctx.get_logits(), (llama.n_vocab(),))
            written.append(int(logits.argmax()))
            if len(written) == count:
                return [written]
            llama.eval(written[-1:])

    _write = write
