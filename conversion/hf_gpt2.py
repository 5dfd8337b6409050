"""Read a GPT-2 in transformers' format, from a folder or the hub."""

from hf_scratch_gpt import ScratchGPTTokenizer

from .sources import GPT2Source


def read_hf_gpt2(source: str) -> GPT2Source:
    """Open the folder or hub id `source`, with its vocabulary if it has one."""
    try:
        tokenizer = ScratchGPTTokenizer.from_pretrained(source)
    except OSError:
        tokenizer = None
    return GPT2Source("transformers GPT-2", {"pretrained_model_name_or_path": source}, tokenizer)
