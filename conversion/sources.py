"""What a reader of a checkpoint format hands over."""

from dataclasses import dataclass
from typing import Any

from hf_scratch_gpt import ScratchGPTTokenizer


@dataclass
class GPT2Source:
    """A GPT-2 in any format, opened but not yet converted.

    Args:
        origin: the format, in words.
        load_arguments: what `ScratchGPTForCausalLM.from_pretrained` loads it with: a folder or hub
            id, or a configuration and a state dict under transformers' names for GPT-2.
        tokenizer: its vocabulary, or None if it has none.
    """

    origin: str
    load_arguments: dict[str, Any]
    tokenizer: ScratchGPTTokenizer | None
