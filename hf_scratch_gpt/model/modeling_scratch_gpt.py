"""The models: transformer blocks between embeddings and a last norm, and heads that read them."""

# B batch, T query tokens, S key tokens, C hidden, V vocabulary, L labels

import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

from .configuration_scratch_gpt import ScratchGPTConfig, check_transformers

# In one line, before an import below fails in its own words.
check_transformers()
# ruff: noqa: E402

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.auto import modeling_auto
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .blocks_scratch_gpt import LayerNorm, MultiHeadAttention, TransformerBlock, masked_attention
from .positions_scratch_gpt import check_inputs, known_keywords, positions_of, raise_past_limit

# Tokens whose logits are in memory at a time, in training by `config.chunked_loss`.
LOSS_PIECE = 512


class ScratchGPTPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of every model here: what it can do, how it starts."""

    config: ScratchGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": TransformerBlock, "attentions": MultiHeadAttention}
    # Old GPT-2 files carry the causal mask as a buffer of each attention; the name is what the
    # loading rules make of it.
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.(masked_)?bias$"]
    # Tells transformers how GPT-2's tensors become ours; the package sets it, code that was copied
    # into a saved model does without.
    register_rules: Callable[[], None] | None = None

    def __init__(self, config: ScratchGPTConfig) -> None:
        if config.model_type != "scratch_gpt":
            raise ValueError(
                f"{type(self).__name__} takes a ScratchGPTConfig, not a {type(config).__name__}; "
                "ScratchGPTConfig(**config.to_dict()) makes one of GPT-2's"
            )
        super().__init__(config)
        config.check()  # fields may have been set since it was made

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Each block adds twice to the shortcut path; the smaller start keeps the sum's variance
        # independent of depth (Radford et al. 2019, section 2.3).
        if getattr(module, "is_residual_projection", False):
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any
    ) -> "ScratchGPTPreTrainedModel":
        """Load a saved model, or convert a GPT-2 in transformers' format while loading it.

        Raises:
            ValueError: a GPT-2 has to be converted first; the error says why and how.
        """
        if pretrained_model_name_or_path is not None:
            _check_source(pretrained_model_name_or_path, cls.register_rules is not None, kwargs)
        if cls.register_rules is not None:
            cls.register_rules()
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.can_generate() and model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = model.config.pad_token_id
        return loaded

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, *args: Any) -> Any:
        """Split `model` over devices; a ValueError if its heads do not divide among them."""
        heads, devices = model.config.num_attention_heads, distributed_config.tp_size
        if heads % devices:
            raise ValueError(
                f"{heads} attention heads do not divide among tp_size={devices} devices; choose a "
                "tp_size that divides them"
            )
        return super().maybe_distribute_model(model, distributed_config, *args)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save model, configuration and code to `save_directory`.

        The tensors keep their names here. transformers' `save_original_format`, True by default,
        would give those of a converted GPT-2 names that no model reads; `export` writes GPT-2's.
        """
        kwargs["save_original_format"] = False
        super().save_pretrained(save_directory, *args, **kwargs)

    def load_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Load an adapter of PEFT's; a ValueError if it changes modules of GPT-2's own code."""
        try:
            super().load_adapter(*args, **kwargs)
        except ValueError as error:
            if not re.search("c_attn|c_proj|c_fc", str(error)):
                raise
            raise ValueError(
                "the adapter changes modules that transformers' GPT-2 has and this model has not; "
                "merge it into GPT-2 by PeftModel's merge_and_unload, call save_pretrained, and "
                "load what that wrote"
            ) from error


def _check_source(source: Any, has_rules: bool, options: dict[str, Any]) -> None:
    """Raise a ValueError if `source` is a GPT-2 that `from_pretrained` cannot convert."""
    if options.get("gguf_file"):
        raise ValueError(
            f"{options['gguf_file']} is a GGUF file, which is not read here; load it with "
            "GPT2LMHeadModel, call save_pretrained, and load what that wrote"
        )
    names = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
    try:
        where = {name: options[name] for name in names if name in options}
        fields, _ = PretrainedConfig.get_config_dict(source, **where)
    except OSError:  # an adapter's folder; or it will be raised again
        return
    if fields.get("model_type") != "gpt2":
        return
    if not has_rules:
        raise ValueError(
            f"{source} is a GPT-2 checkpoint, which code saved with a model cannot convert; load "
            "it by the classes of the package hf_scratch_gpt, or convert it with that package"
        )
    splits = any(options.get(name) for name in ("distributed_config", "tp_plan", "tp_size"))
    if splits or options.get("quantization_config") or fields.get("quantization_config"):
        raise ValueError(
            f"{source} is a GPT-2 checkpoint: it holds query, key and value in one matrix, which "
            f"cannot be {'split over devices' if splits else 'quantized'} while it is read. Load "
            "it as it is in one process, call save_pretrained, and load what that wrote"
        )


class ScratchGPTModel(ScratchGPTPreTrainedModel):
    """Token and position embedding, the transformer blocks, and a last LayerNorm."""

    def __init__(self, config: ScratchGPTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(
            [TransformerBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps, config.fused_kernels)
        self.gradient_checkpointing = False
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache", raise_if_both_names=True)
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Turn tokens into vectors that have seen the tokens before them.

        Args:
            input_ids: token ids, (B, T).
            attention_mask: (B, S), 1 for tokens and 0 for padding, cached tokens included; or a
                mask as transformers makes it for the attention implementation, (B, 1, T, S).
            position_ids: (B, T) or (1, T), each token's position. Without them, positions count the
                tokens that `attention_mask` shows. Counting anew within a row packs several texts
                into it, where there is neither an `attention_mask` nor a cache.
            cache: keys and values of earlier tokens, extended in place.
            inputs_embeds: (B, T, C), vectors to use in place of the token embedding's.
            use_cache: return `cache`.
            token_type_ids: (B, T) or (1, T), ids whose embeddings are added, as GPT-2 does: who is
                speaking, in DialoGPT and its like.
            kwargs: what is recorded (`output_hidden_states`, `output_attentions`), what hosts hand
                to every model and what the attention function declares; see `known_keywords`.

        Returns:
            `last_hidden_state` (B, T, C), and what was asked for besides.

        Raises:
            ValueError: a token cannot be read; see `check_inputs` and `positions_of`.
            TypeError: nobody reads a keyword argument.
        """
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, masked_attention
        )
        kwargs = known_keywords(kwargs, self.forward, attend)
        embed_tokens = getattr(self, "embed_tokens", None)  # some tools remove it
        vocab_size = getattr(embed_tokens, "num_embeddings", self.config.vocab_size)
        check_inputs(self.config, vocab_size, input_ids, inputs_embeds, token_type_ids, cache)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # (B, T, C)

        first_layer = self._first_layer()
        # The cache of continuous batching holds many texts; it comes with positions.
        past_length = cache.get_seq_length(first_layer) if isinstance(cache, Cache) else 0
        positions = positions_of(
            self.config, inputs_embeds, attention_mask, position_ids, cache, past_length
        )  # (B or 1, T)
        # Made of the cache that was given: only without one may several texts be packed into a row.
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
            layer_idx=first_layer,
        )
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        hidden_states = inputs_embeds
        # Pipeline parallelism hands later stages hidden states that hold their positions already.
        if first_layer == 0:
            hidden_states = hidden_states + self.embed_positions(positions)
            if token_type_ids is not None:
                hidden_states = hidden_states + self.embed_tokens(token_type_ids)
            hidden_states = self.dropout(hidden_states)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, causal_mask, cache=cache, position_ids=positions, **kwargs
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), cache=cache)

    def _first_layer(self) -> int:
        """Index of the first block that this process holds.

        Pipeline parallelism puts an nn.Identity where another process holds the block.
        """
        held = (i for i, layer in enumerate(self.layers) if not isinstance(layer, nn.Identity))
        return next(held, 0)


class ScratchGPTForCausalLM(ScratchGPTPreTrainedModel, GenerationMixin):
    """The language model: for each token, a score for every token that may come next."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: ScratchGPTConfig) -> None:
        super().__init__(config)
        self.model = ScratchGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache", raise_if_both_names=True)
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Score the next tokens.

        Args:
            labels: (B, T), usually `input_ids`: token t is compared with label t + 1, the shift is
                done here. -100 marks tokens that do not count.
            logits_to_keep: how many of the last tokens to score, 0 for all, or which, as a tensor.
            kwargs: `num_items_in_batch` divides the loss in place of the number of labels.

            The others are those of `ScratchGPTModel.forward`.

        Returns:
            `logits` (B, T, V); with labels, `loss`, the mean negative log-likelihood in nats per
            token. A loss by `config.chunked_loss`, in training, comes without logits.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            token_type_ids=token_type_ids,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = loss = None
        if labels is not None and self._takes_loss_in_pieces():
            loss = self.loss_in_pieces(hidden_states, labels, **kwargs)
        else:
            logits = self.lm_head(hidden_states)
            if labels is not None:
                loss = self.loss_function(
                    logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
                )
        recorded = {name: outputs[name] for name in outputs if name != "last_hidden_state"}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **recorded)

    def _takes_loss_in_pieces(self) -> bool:
        """Whether it is wanted, and neither the loss nor the head has been replaced."""
        wanted = self.config.chunked_loss and self.training
        if not wanted or self.loss_function is not ForCausalLMLoss:
            return False
        # An adapter is not a linear layer, and a quantized weight not an ordinary parameter.
        return isinstance(self.lm_head, nn.Linear) and type(self.lm_head.weight) is nn.Parameter

    def loss_in_pieces(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """transformers' `ForCausalLMLoss`, without all logits in memory at once.

        Args:
            hidden_states: (B, T, C).
            labels: (B, T); token t is compared with label t + 1. `ignore_index` does not count.
            num_items_in_batch: what the sum over tokens is divided by; their number if not given.
            shift_labels: (B, T), labels that are shifted already, in place of `labels`.

        Returns:
            The mean negative log-likelihood in nats, in float32. It can be differentiated once.

        Raises:
            ValueError: there are more or fewer labels than hidden states.
        """
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        if shift_labels.shape != hidden_states.shape[:-1]:
            raise ValueError(
                f"labels have the shape {list(shift_labels.shape)}, and the tokens "
                f"{list(hidden_states.shape[:-1])}; give one label for each"
            )
        shift_labels = shift_labels.flatten().to(hidden_states.device)
        losses = F.linear_cross_entropy(
            hidden_states.flatten(0, -2),
            self.lm_head.weight,
            shift_labels,
            linear_bias=self.lm_head.bias,
            reduction="none",
            ignore_index=ignore_index,
            options=nn.LinearCrossEntropyOptions(
                batch_chunk_size=LOSS_PIECE, acc_policy="accurate"
            ),
        )
        if num_items_in_batch is None:
            num_items_in_batch = (shift_labels != ignore_index).sum()
        # In half precision the mean would be rounded to two digits.
        return losses.float().sum() / num_items_in_batch

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        *args: Any,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare one step of `generate`; a step past the last position raises a ValueError.

        `position_ids` (B, S) has a position for every token so far; `generate` looks for the name
        `inputs_embeds`; the others are those of `GenerationMixin.prepare_inputs_for_generation`.
        """
        limit = self.config.max_position_embeddings
        # Here, because a compiled step cannot look; by length first, as values may lie on a GPU.
        if position_ids is not None and position_ids.shape[-1] > limit:
            last_position = position_ids.max()
            if last_position >= limit:
                raise_past_limit(last_position + 1, limit)
        return super().prepare_inputs_for_generation(
            input_ids, *args, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )


def _names_token_type_ids(head: Any) -> Any:
    """Let `head.forward` name an argument that it hands on: Trainer drops the column otherwise."""
    inherited = head.forward

    @functools.wraps(inherited)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return inherited(self, *args, **kwargs)

    signature = inspect.signature(inherited)
    named = inspect.Parameter("token_type_ids", inspect.Parameter.KEYWORD_ONLY, default=None)
    *others, last = signature.parameters.values()
    forward.__signature__ = signature.replace(parameters=[*others, named, last])  # type: ignore
    head.forward = forward
    return head


# The heads take their `forward` from transformers. Their `__init__` there builds the base model
# through AutoModel, which does not know this class where the code was loaded from a model's own
# folder.


@_names_token_type_ids
class ScratchGPTForSequenceClassification(
    GenericForSequenceClassification, ScratchGPTPreTrainedModel
):
    """One score for each label and text, (B, L), read from the text's last token."""

    def __init__(self, config: ScratchGPTConfig) -> None:
        ScratchGPTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = ScratchGPTModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


@_names_token_type_ids
class ScratchGPTForTokenClassification(GenericForTokenClassification, ScratchGPTPreTrainedModel):
    """One score for each label and token, (B, T, L)."""

    def __init__(self, config: ScratchGPTConfig) -> None:
        ScratchGPTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = ScratchGPTModel(config)
        given = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout if given is None else given)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


@_names_token_type_ids
class ScratchGPTForQuestionAnswering(GenericForQuestionAnswering, ScratchGPTPreTrainedModel):
    """Two scores for each token, (B, T): that the answer starts there, that it ends there."""

    def __init__(self, config: ScratchGPTConfig) -> None:
        ScratchGPTPreTrainedModel.__init__(self, config)
        self.model = ScratchGPTModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


# By these tables Trainer shifts labels under label smoothing, and pipelines and servers know what a
# model is for. A copy of this code enters itself.
for _model_class, _table in {
    ScratchGPTModel: modeling_auto.MODEL_MAPPING_NAMES,
    ScratchGPTForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    ScratchGPTForSequenceClassification: (
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    ),
    ScratchGPTForTokenClassification: modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ScratchGPTForQuestionAnswering: modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}.items():
    _table.setdefault(ScratchGPTConfig.model_type, _model_class.__name__)

ScratchGPTModel.register_for_auto_class("AutoModel")
ScratchGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
ScratchGPTForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
ScratchGPTForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
ScratchGPTForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
