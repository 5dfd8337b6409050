"""A GPT written from scratch that transformers takes for its own and that runs GPT-2's weights.

Importing this package registers its classes with transformers, so that `AutoModelForCausalLM` and
the others find them.
"""

import sys

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from .checkpoints.names import register_gpt2_rules
from .engine.swap import optimize_for_generation, optimize_for_training, restore
from .model.blocks_scratch_gpt import (
    GELU,
    FeedForward,
    LayerNorm,
    MultiHeadAttention,
    TransformerBlock,
)
from .model.configuration_scratch_gpt import VERSION, ScratchGPTConfig
from .model.modeling_scratch_gpt import (
    ScratchGPTForCausalLM,
    ScratchGPTForQuestionAnswering,
    ScratchGPTForSequenceClassification,
    ScratchGPTForTokenClassification,
    ScratchGPTModel,
    ScratchGPTPreTrainedModel,
)
from .model.tokenization_scratch_gpt import ScratchGPTTokenizer

__version__ = VERSION

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
    "restore",
]


def register() -> None:
    """Set the classes in `transformers`, where servers look a class up by its name.

    Importing the package does it. vLLM calls it by its entry point, in each of its processes.
    """
    host = sys.modules["transformers"]  # it replaces its module while it is imported
    for name in __all__:
        if name.startswith("ScratchGPT"):
            setattr(host, name, globals()[name])


register()
AutoConfig.register("scratch_gpt", ScratchGPTConfig, exist_ok=True)
AutoModel.register(ScratchGPTConfig, ScratchGPTModel, exist_ok=True)
AutoModelForCausalLM.register(ScratchGPTConfig, ScratchGPTForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    ScratchGPTConfig, ScratchGPTForSequenceClassification, exist_ok=True
)
AutoModelForTokenClassification.register(
    ScratchGPTConfig, ScratchGPTForTokenClassification, exist_ok=True
)
AutoModelForQuestionAnswering.register(
    ScratchGPTConfig, ScratchGPTForQuestionAnswering, exist_ok=True
)
AutoTokenizer.register(ScratchGPTConfig, tokenizer_class=ScratchGPTTokenizer, exist_ok=True)
# When a model is loaded, as it takes transformers 45 ms to make its table ready.
ScratchGPTPreTrainedModel.register_rules = staticmethod(register_gpt2_rules)
