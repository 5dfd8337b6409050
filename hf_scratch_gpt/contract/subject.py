"""The model class under test, and how tiny models of it are made."""

import json
import pkgutil
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

# An odd vocabulary does not divide among processes; two layers, as more teach nothing.
SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
PADDING = 0
# No text ends early.
TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": PADDING}


@dataclass(frozen=True)
class Subject:
    """A model class and the fields of its tiny configuration.

    Args:
        name: where the class is, as "package.module:Class".
        model_class: the class.
        fields: arguments of its configuration.
    """

    name: str
    model_class: type[PreTrainedModel]
    fields: dict[str, Any]

    @classmethod
    def of(cls, name: str, overrides: str = "{}") -> "Subject":
        """The class that `name` names, with fields in JSON beside the tiny sizes.

        Raises:
            ValueError: there is no such class, or no configuration of these fields.
        """
        model_class = find_class(name)
        config_class = model_class.config_class
        try:
            fields = tiny_fields(config_class) | json.loads(overrides)
            config_class(**fields)
        except Exception as error:
            told = " ".join(str(error).split())
            raise ValueError(
                f"{config_class.__name__} refuses the tiny sizes: {told}; give the fields that it "
                "needs as --model-config='{\"name\": value}'"
            ) from error
        return cls(name, model_class, fields)

    def config(self, **changes: Any) -> PretrainedConfig:
        """A tiny configuration, with some fields changed."""
        config_class: Any = self.model_class.config_class
        return config_class(**self.fields | changes)

    def fresh(self, **changes: Any) -> Any:
        """A model as its class initialises it, in evaluation mode."""
        return self.model_class(self.config(**changes)).eval()

    def random(self, **changes: Any) -> Any:
        """A model whose every weight, bias and norm differs from its initial value.

        Fresh models are too regular: a bias of 0 that is dropped is not missed.
        """
        model = self.fresh(**changes)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model


def find_class(name: str) -> Any:
    """The model class that is named as "package.module:Class"; a ValueError if there is none."""
    try:
        model_class = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--model-class={name}: {error}; give it as package.module:Class, and install the "
            "package or name its folder in PYTHONPATH"
        ) from error
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
        raise ValueError(
            f"--model-class={name} is not a subclass of transformers' PreTrainedModel; give "
            "the class of the causal language model"
        )
    return model_class


def tiny_fields(config_class: Any) -> dict[str, Any]:
    """Tiny sizes, no dropout and no special tokens but padding, of the fields that there are."""
    defaults = config_class().to_dict()
    known = {*defaults, *config_class.attribute_map}
    sizes = {name: size for name, size in SIZES.items() if name in known}
    is_number = {name: type(value) in (int, float) for name, value in defaults.items()}
    no_dropout = {name: 0.0 for name in defaults if is_number[name] and "drop" in name}
    no_dropout |= {name: 0.0 for name in defaults if is_number[name] and name.endswith("_pdrop")}
    return sizes | no_dropout | TOKENS


def random_ids(model: Any, *shape: int) -> torch.Tensor:
    """Token ids, the padding token not among them."""
    return torch.randint(PADDING + 1, model.config.vocab_size, shape)


def left_padded(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (2, 12) and their mask; the second text has 8 tokens, after padding."""
    ids = random_ids(model, 2, 12)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids.where(mask.bool(), PADDING), mask


def blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """The transformer blocks, and their name within the base model."""
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return name, module
    raise AssertionError("the base model has no nn.ModuleList of num_hidden_layers blocks")


def matrices(model: Any) -> dict[str, nn.Module]:
    """Modules of the blocks that hold a matrix, by their names within the base model."""
    prefix, layers = blocks(model)
    return {
        f"{prefix}.{name}": module
        for name, module in layers.named_modules()
        if any(parameter.ndim == 2 for parameter in module.parameters(recurse=False))
    }


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    """Assert that two results differ by rounding in float32 alone."""
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
