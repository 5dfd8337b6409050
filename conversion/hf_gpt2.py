"""Read a GPT-2 in transformers' format, from a folder or the hub."""

from pathlib import Path

from transformers import PretrainedConfig

from hf_scratch_gpt import ScratchGPTTokenizer

from .sources import GPT2Source


def read_hf_gpt2(source: str) -> GPT2Source:
    """Open the folder or hub id `source`, with its vocabulary if it has one.

    Raises:
        OSError: there is no such folder or hub id.
        ValueError: it holds a model of another kind.
    """
    fields, _ = PretrainedConfig.get_config_dict(source)
    if fields.get("model_type") not in ("gpt2", "scratch_gpt"):
        raise ValueError(
            f"{source} is a model of type {fields.get('model_type')!r}; only GPT-2 can be converted"
        )
    names = ScratchGPTTokenizer.vocab_files_names.values()
    is_folder = Path(source).is_dir()
    if is_folder and not any((Path(source) / name).is_file() for name in names):
        tokenizer = None
    else:
        tokenizer = ScratchGPTTokenizer.from_pretrained(source)
    return GPT2Source("transformers GPT-2", {"pretrained_model_name_or_path": source}, tokenizer)
