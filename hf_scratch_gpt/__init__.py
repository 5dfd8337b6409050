"""A GPT written from scratch that transformers takes for its own and that runs GPT-2's weights.

Importing this package registers its classes with transformers, so that `AutoModelForCausalLM` and
the others find them. What takes time is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register, register_when_used

if TYPE_CHECKING:
    from .engine.swap import (
        optimize_for_generation,
        optimize_for_training,
        restore,
    )
    from .model.blocks_scratch_gpt import (
        GELU,
        FeedForward,
        LayerNorm,
        MultiHeadAttention,
        TransformerBlock,
    )
    from .model.configuration_scratch_gpt import ScratchGPTConfig
    from .model.modeling_scratch_gpt import (
        ScratchGPTForCausalLM,
        ScratchGPTForQuestionAnswering,
        ScratchGPTForSequenceClassification,
        ScratchGPTForTokenClassification,
        ScratchGPTModel,
        ScratchGPTPreTrainedModel,
    )
    from .model.tokenization_scratch_gpt import ScratchGPTTokenizer

    __version__: str

# Where each name is, for those who use it; the imports above are for type checkers.
_MODULES = {
    ".engine.swap": "optimize_for_generation optimize_for_training restore",
    ".model.blocks_scratch_gpt": "GELU FeedForward LayerNorm MultiHeadAttention TransformerBlock",
    ".model.configuration_scratch_gpt": "ScratchGPTConfig",
    ".model.modeling_scratch_gpt": "ScratchGPTForCausalLM ScratchGPTForQuestionAnswering "
    "ScratchGPTForSequenceClassification ScratchGPTForTokenClassification ScratchGPTModel "
    "ScratchGPTPreTrainedModel",
    ".model.tokenization_scratch_gpt": "ScratchGPTTokenizer",
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "GELU",
    "FeedForward",
    "LayerNorm",
    "MultiHeadAttention",
    "ScratchGPTConfig",
    "ScratchGPTForCausalLM",
    "ScratchGPTForQuestionAnswering",
    "ScratchGPTForSequenceClassification",
    "ScratchGPTForTokenClassification",
    "ScratchGPTModel",
    "ScratchGPTPreTrainedModel",
    "ScratchGPTTokenizer",
    "TransformerBlock",
    "optimize_for_generation",
    "optimize_for_training",
    "register",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module(".model.configuration_scratch_gpt", __name__).VERSION
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_used()
