"""The configuration: one set of names, the published sizes, how the model splits over devices."""

import inspect
import re
import sys
from collections.abc import Iterator
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, ClassVar

import transformers
from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging

from .presets_scratch_gpt import (
    END_OF_TEXT_ID,
    GELU_FORMS,
    PRESET_ALIASES,  # noqa: F401  # for those who import this file
    PRESETS,  # noqa: F401
    check_sizes,
    find_preset,
)

if TYPE_CHECKING:
    # Never run. transformers reads it where it copies this file, and copies the models along, which
    # a saved configuration names.
    from .modeling_scratch_gpt import ScratchGPTModel  # noqa: F401

# Of this code, which travels with every saved model, and of the package.
VERSION = "0.2.0"
TESTED = "5.24.0"  # the transformers that it was tested with

logger = logging.get_logger(__name__)

_DROPOUTS = ("embedding_dropout", "hidden_dropout", "attention_dropout")

# Fields of files that change nothing here: the first is a matter of precision, which the kernels
# settle; the second belongs to GPT-2's double-heads model.
_IGNORED = re.compile(
    "reorder_and_upcast_attn|summary_.*|task_specific_params|model_type|code_version"
)

# Others follow from these, and so they are set first.
_PARENTS = ("vocab_size", "hidden_size")

# Where each Auto class finds its class among the files that are saved with a model.
_TASKS = ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
_AUTO_MAP = {
    "AutoConfig": "configuration_scratch_gpt.ScratchGPTConfig",
    "AutoModel": "modeling_scratch_gpt.ScratchGPTModel",
    **{f"AutoModelFor{task}": f"modeling_scratch_gpt.ScratchGPTFor{task}" for task in _TASKS},
}


@strict
class ScratchGPTConfig(PretrainedConfig):
    """Sizes and switches of a GPT. The defaults are GPT-2 with 124M parameters.

    Arguments go by transformers' standard names. GPT-2's own (`n_embd`, `n_layer`, `n_head`,
    `n_positions`, `n_ctx`, `n_inner`, `resid_pdrop`, ...) and the textbook's (`emb_dim`,
    `n_layers`, `n_heads`, `context_length`, `drop_rate`) are accepted for the same fields.

    Args:
        vocab_size: number of token ids, V.
        hidden_size: width of a token's vector, C.
        num_hidden_layers: number of transformer blocks.
        num_attention_heads: heads a block attends with, H; divides `hidden_size`.
        intermediate_size: width inside the feed-forward network; 4 * `hidden_size` if not given.
        max_position_embeddings: positions the model knows, the longest text in tokens.
        hidden_act: "gelu_new" (GPT-2's tanh form), "gelu" (the exact form), or any activation that
            transformers knows.
        qkv_bias: whether the query, key and value projections add a bias.
        tie_word_embeddings: whether the output head shares the token embedding's weights.
        scale_attn_weights: whether scores are divided by the square root of the head size.
        scale_attn_by_inverse_layer_idx: whether layer i's scores are divided by i + 1 as well.
        fused_kernels: compute LayerNorm and GELU by torch's fused kernels (True) or written out
            (False). A choice for the run, which is stored with the model all the same. Attention
            is chosen by transformers' `attn_implementation`.
        chunked_loss: compute the loss of training a few hundred tokens at a time, which takes less
            memory and gives no `logits`. Stored with the model too.
        layer_norm_eps: added to the variance in LayerNorm.
        embedding_dropout, hidden_dropout, attention_dropout: probability of dropping an embedding,
            a sub-layer's output, an attention weight, in training.
        classifier_dropout: the same before the token-classification head; `hidden_dropout` if not
            given.
        initializer_range: standard deviation of the initial weights.
        use_cache: return keys and values for the next step by default.
        bos_token_id, eos_token_id, pad_token_id: the end-of-text token, if the vocabulary is large
            enough.

    Raises:
        ValueError: a value is out of its range, or two names for one field disagree.

    Example:
    >>> ScratchGPTConfig.from_preset("gpt2-medium").hidden_size
    1024
    >>> ScratchGPTConfig(emb_dim=64, n_layers=2, n_heads=4, context_length=128).intermediate_size
    256
    """

    model_type = "scratch_gpt"
    attribute_map: ClassVar[dict[str, str]] = {
        "n_vocab": "vocab_size",
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "n_ctx": "max_position_embeddings",
        "n_inner": "intermediate_size",
        "activation_function": "hidden_act",
        "layer_norm_epsilon": "layer_norm_eps",
        "embd_pdrop": "embedding_dropout",
        "resid_pdrop": "hidden_dropout",
        "attn_pdrop": "attention_dropout",
        "emb_dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "context_length": "max_position_embeddings",
        "drop_rate": "hidden_dropout",  # when it is read; it sets all three
    }

    # The columns of a head stay together: a device holds whole heads, and one sum a sub-layer joins
    # them.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    max_position_embeddings: int = 1024
    hidden_act: str = "gelu_new"
    qkv_bias: bool = True
    tie_word_embeddings: bool = True
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    fused_kernels: bool = True
    chunked_loss: bool = False
    layer_norm_eps: float | int = 1e-5
    embedding_dropout: float | int = 0.1
    hidden_dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    classifier_dropout: float | int | None = None
    initializer_range: float | int = 0.02
    use_cache: bool = True
    bos_token_id: int | None = END_OF_TEXT_ID
    eos_token_id: int | list[int] | None = END_OF_TEXT_ID
    pad_token_id: int | None = END_OF_TEXT_ID

    def __new__(cls, *args: Any, **kwargs: Any) -> "ScratchGPTConfig":
        # Later, a default could not be told from a value that was given.
        cls.by_field(kwargs)
        return super().__new__(cls)

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs = {k: v for k, v in self.by_field(kwargs).items() if not _IGNORED.fullmatch(k)}
        if kwargs.pop("add_cross_attention", False):
            raise ValueError(
                "add_cross_attention=True asks for an encoder-decoder, and this model is a decoder "
                "only; drop the field, or use transformers' GPT2Model"
            )
        for name in kwargs:
            if callable(getattr(type(self), name, None)):
                raise ValueError(
                    f"{name} is a method of the configuration, not a field; leave it out"
                )
        head_dim = kwargs.pop("head_dim", None)
        super().__post_init__(**kwargs)
        # A loaded file may name another repository's code; what is saved travels with its own.
        self.auto_map = dict(_AUTO_MAP)
        self.code_version = VERSION
        self._derive()
        self.check()
        if head_dim not in (None, self.head_dim):
            raise ValueError(
                f"head_dim={head_dim} is not hidden_size={self.hidden_size} divided by "
                f"num_attention_heads={self.num_attention_heads}; leave it out"
            )

    @classmethod
    def by_field(cls, given: dict[str, Any]) -> dict[str, Any]:
        """`given`, with each value under its field's own name.

        Raises:
            ValueError: two names for one field have different values.
        """
        named: dict[str, tuple[str, Any]] = {}
        for name, value in given.items():
            if name == "n_ctx" and "n_positions" in given:
                continue  # GPT-2's files carry both, and only `n_positions` sizes the model.
            for field in cls._fields_of(name):
                first, before = named.setdefault(field, (name, value))
                if before != value:
                    raise ValueError(
                        f"{first}={before} and {name}={value} name the same field with different "
                        "values; give one of them"
                    )
        values = {field: value for field, (_, value) in named.items()}
        return {name: values[name] for name in _PARENTS if name in values} | values

    @classmethod
    def _fields_of(cls, name: str) -> tuple[str, ...]:
        return _DROPOUTS if name == "drop_rate" else (cls.attribute_map.get(name, name),)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.attribute_map:
            for field in self._fields_of(name):
                setattr(self, field, value)  # which checks its type
            return
        is_made = "code_version" in self.__dict__
        was_derived = is_made and self.intermediate_size == 4 * self.hidden_size
        if name == "hidden_size" and was_derived:
            super().__setattr__("intermediate_size", None)
        super().__setattr__(name, value)
        if is_made and name in (*_PARENTS, "intermediate_size"):
            self._derive()

    def _derive(self) -> None:
        """Set the fields that follow from others."""
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name) == END_OF_TEXT_ID and self.vocab_size <= END_OF_TEXT_ID:
                setattr(self, name, None)

    def update(self, config_dict: dict[str, Any]) -> None:
        """Set several fields, by any of their names."""
        super().update(self.by_field(config_dict))

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range, the limit and the remedy."""
        check_sizes(vars(self))
        if self.eos_token_id == []:
            raise ValueError("eos_token_id=[] names no token; give one, or None")
        if self.hidden_act not in GELU_FORMS and self.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act={self.hidden_act!r} is not an activation of transformers; choose "
                f"{', '.join(GELU_FORMS)}, or another of transformers.activations.ACT2FN"
            )
        for name in (*_DROPOUTS, "classifier_dropout"):
            probability = getattr(self, name)
            if probability is not None and not 0 <= probability <= 1:
                raise ValueError(
                    f"{name}={probability} is not a probability; give a number from 0 to 1"
                )
        for name in ("layer_norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not above 0; give a small positive number"
                )

    @property
    def head_dim(self) -> int:
        """Size of one head's queries, keys and values, D."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "ScratchGPTConfig":
        """The configuration of a published size.

        Args:
            name: one of `PRESETS` or `PRESET_ALIASES`, such as "gpt2-medium", "355M" or
                "gpt3-175b".
            overrides: fields to set otherwise, such as `qkv_bias=False`.

        Raises:
            ValueError: no preset has that name; the error lists the nearest ones.
        """
        return cls(**find_preset(name) | cls.by_field(overrides))

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a configuration file, ours or GPT-2's; return its fields and the unused `kwargs`."""
        fields, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        _warn_of_older_code(fields, pretrained_model_name_or_path)
        if fields.get("model_type") == "gpt2":
            fields = {**fields, "model_type": cls.model_type}
            # GPT-2's files name no padding token, and then a batch cannot be generated from. A
            # classifier is left as it is: it reads the last token that is not padding.
            classifies = "GPT2ForSequenceClassification" in (fields.get("architectures") or [])
            if fields.get("pad_token_id") is None and not classifies:
                ends = fields.get("eos_token_id", END_OF_TEXT_ID)
                fields["pad_token_id"] = next(iter(ends), None) if isinstance(ends, list) else ends
        return fields, unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "ScratchGPTConfig":
        """Make a configuration of what a file holds; `AutoConfig` calls this."""
        if "name_or_path" in kwargs:
            _warn_of_older_code(config_dict, kwargs["name_or_path"])
        return super().from_dict(config_dict, **cls.by_field(kwargs))

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dictionary of plain values."""
        # PEFT asks for it just before it looks up which modules it adapts by default: the one place
        # that serves whether PEFT is imported before this package or after it.
        _offer_peft_defaults(self.model_type)
        return super().to_dict()


def _warn_of_older_code(fields: dict[str, Any], where: Any) -> None:
    """Log a warning, once, if the saved model at `where` carries older code than this.

    The first versions of this code saved no `code_version`.
    """
    saved = fields.get("code_version", "0.1.0" if "auto_map" in fields else VERSION)
    if fields.get("model_type") == "scratch_gpt" and _parts(saved) < _parts(VERSION):
        logger.warning_once(
            f"{where} holds code of hf_scratch_gpt {saved}, older than this {VERSION}. Loaded by "
            "that code (trust_remote_code=True, without this package), it writes wrong text with "
            "transformers 5.24 and newer. To refresh the code, load model and tokenizer with "
            "from_pretrained and save both to the same folder with save_pretrained"
        )


def _parts(version: str) -> list[int]:
    """The numbers of a version: [0, 2, 0] of "0.2.0"."""
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


def _offer_peft_defaults(model_type: str) -> None:
    """Tell PEFT, if it is imported, which modules to adapt where a user names none.

    Our modules carry Llama's names, and so Llama's defaults fit, for every method.
    """
    for name, table in vars(sys.modules.get("peft.utils.constants", object)).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and "llama" in table:
            table.setdefault(model_type, table["llama"])
    prompts = vars(sys.modules.get("peft.tuners.adaption_prompt.config", object))
    attentions = prompts.get("TRANSFORMERS_MODEL_CONFIG", {})
    if "llama" in attentions:
        # As for GPT-2, prompts are not projected again: that would add the bias twice.
        ours = attentions["llama"]._replace(compute_query_states=_query_states, o_proj_layer=None)
        attentions.setdefault(model_type, ours)


def _query_states(model: Any, hidden_states: Any, **kwargs: Any) -> Any:
    """Queries (B, H, T, D) of the attention block `model`, for PEFT's adaption prompt."""
    by_heads = (*hidden_states.shape[:-1], -1, model.head_dim)
    return model.q_proj(hidden_states).view(by_heads).transpose(1, 2)


# Objects, and the parameters that are passed to them, or received from them, by name.
_NEEDED = [
    "transformers:DynamicCache config",
    "transformers.masking_utils:create_causal_mask cache position_ids layer_idx",
    "transformers.modeling_outputs:BaseModelOutputWithPast last_hidden_state cache",
    "transformers.modeling_outputs:CausalLMOutputWithPast loss logits cache",
    "transformers.modeling_layers:GenericForSequenceClassification.forward cache",
    "transformers.modeling_layers:GenericForTokenClassification.forward cache",
    "transformers.modeling_layers:GenericForQuestionAnswering.forward cache",
    "transformers.modeling_layers:GradientCheckpointingLayer",
    "transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS.get_interface",
    "transformers.modeling_utils:slice_logits_to_keep",
    "transformers.initialization:normal_ mean std",
    "transformers.loss.loss_utils:ForCausalLMLoss num_items_in_batch shift_labels",
    "transformers.utils:can_return_tuple",
    "transformers.utils:TransformersKwargs",
    "transformers.utils.deprecation:deprecate_kwarg new_name",
    "transformers.utils.generic:merge_with_config_defaults",
    "transformers.utils.import_utils:is_tracing",
    "transformers.utils.output_capturing:capture_outputs",
    "transformers.generation:GenerationMixin.prepare_inputs_for_generation cache inputs_embeds",
    "transformers.generation.continuous_batching.cache:PagedAttentionCache.update layer_idx kwargs",
    "transformers.generation.continuous_batching.input_outputs:PagedAttentionArgs",
]


def _lacking() -> Iterator[str]:
    """What the models need and the installed transformers does not have."""
    for needed in _NEEDED:
        name, *parameters = needed.split()
        try:
            found = resolve_name(name)
        except (ImportError, AttributeError):
            yield name.replace(":", ".")
            continue
        known = inspect.signature(found).parameters if parameters else {}
        for parameter in set(parameters) - set(known):
            yield f"the argument {parameter!r} of {name.partition(':')[2]}"


def check_transformers() -> None:
    """Raise an ImportError if transformers lacks something that the models rely on.

    A saved model may meet a transformers that is years newer. 5.24 calls `cache` what 5.23 called
    `past_key_values`, and code that knew the old name alone wrote wrong text without an error.
    """
    lacking = list(_lacking())
    if lacking:
        raise ImportError(
            f"transformers {transformers.__version__} does not fit this model: it lacks "
            f"{', '.join(lacking)}. The model was tested with transformers {TESTED}: pip install "
            f"transformers=={TESTED}. For a newer transformers, upgrade hf_scratch_gpt; a saved "
            "model is refreshed by from_pretrained and save_pretrained of the new version"
        )


ScratchGPTConfig.register_for_auto_class()
