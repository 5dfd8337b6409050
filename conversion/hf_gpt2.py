"""Read a GPT-2 in transformers' format, from a folder or the hub."""

from pathlib import Path

from hf_scratch_gpt import ScratchGPTTokenizer

from .sources import GPT2Source


def read_hf_gpt2(source: str) -> GPT2Source:
    """Open the folder or hub id `source`, with its vocabulary if it has one."""
    names = ScratchGPTTokenizer.vocab_files_names.values()
    is_folder = Path(source).is_dir()
    if is_folder and not any((Path(source) / name).is_file() for name in names):
        tokenizer = None
    else:
        tokenizer = ScratchGPTTokenizer.from_pretrained(source)
    return GPT2Source("transformers GPT-2", {"pretrained_model_name_or_path": source}, tokenizer)
