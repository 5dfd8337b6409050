"""Tiny random models: GPT-2 as transformers writes it, and ours."""

import torch
from torch import nn
from transformers import (
    ContinuousBatchingConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from hf_scratch_gpt import (
    ScratchGPTConfig,
    ScratchGPTForCausalLM,
    ScratchGPTForQuestionAnswering,
    ScratchGPTForSequenceClassification,
    ScratchGPTForTokenClassification,
    ScratchGPTModel,
)

VOCABULARY = 97
POSITIONS = 64
TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), VOCABULARY - 1)
CLASSES = [
    ScratchGPTModel,
    ScratchGPTForCausalLM,
    ScratchGPTForSequenceClassification,
    ScratchGPTForTokenClassification,
    ScratchGPTForQuestionAnswering,
]
# Of continuous batching, which otherwise takes most of the machine's memory for its cache.
SMALL_CACHE = ContinuousBatchingConfig(page_size=32, num_blocks=32, max_batch_tokens=64)


def randomize(model: nn.Module) -> nn.Module:
    """Give all weights, biases and norms too, values large enough to show a difference."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def random_gpt2(
    model_class: type[PreTrainedModel] = GPT2LMHeadModel, **fields: object
) -> PreTrainedModel:
    """A GPT-2 of transformers' own code."""
    sizes = {"vocab_size": VOCABULARY, "n_positions": POSITIONS, "n_embd": 32, "n_head": 4}
    config = GPT2Config(**{**sizes, **TOKENS, "n_layer": 3, **fields})
    return randomize(model_class(config))


def tiny_config(**fields: object) -> ScratchGPTConfig:
    """The configuration of `random_model`."""
    sizes = dict(vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, hidden_size=32)
    return ScratchGPTConfig(
        **{**sizes, **TOKENS, "num_hidden_layers": 3, "num_attention_heads": 4, **fields}
    )


def random_model(model_class: type[PreTrainedModel], **fields: object) -> PreTrainedModel:
    """A model of ours."""
    return randomize(model_class(tiny_config(**fields)))


def random_ids(*shape: int) -> torch.Tensor:
    """Token ids, the padding token not among them."""
    return torch.randint(0, VOCABULARY - 1, shape)
