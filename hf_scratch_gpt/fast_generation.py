"""Make `generate` as fast as the memory allows: `optimize_for_generation(model)`.

What is special to a device or a number format is here, so that the model's own code stays plain.
"""

import threading
from typing import Any

import torch
from torch import nn
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .linear_scratch_gpt import by_onednn, is_one_token, is_plain_inference, written_out
from .positions_scratch_gpt import raise_past_limit

# Formats of weights, and the names of torchao's settings for them.
FORMATS = {
    "int8": "Int8WeightOnlyConfig",
    "int4": "Int4WeightOnlyConfig",
    "fp8": "Float8WeightOnlyConfig",
}
_ON_GPU_ALONE = ("int4", "fp8")
_ATTENTION = "one_token_or_sdpa"


def optimize_for_generation(model: PreTrainedModel, weights: str | None = None) -> PreTrainedModel:
    """Change `model`, a language model of ours, so that its `generate` runs at its fastest.

    One text at a time is written by a compiled step over a cache of fixed size. The first call
    compiles it, which takes a C++ compiler and, on two cores, 15 to 30 seconds; later calls with
    any prompt and any length find it ready. Several texts at once, and whatever else `generate`
    can do, run as before; on a CPU with weights packed for oneDNN, which takes as much memory
    again. On a GPU any number of texts is compiled, into CUDA graphs; each number anew.

    The outputs are those of before, up to the order in which sums are rounded. Change weights, add
    hooks and adapters, choose data type and device before, not afterwards; and pickle nothing.

    Args:
        model: in evaluation mode, on its device and in its data type.
        weights: a format to keep the weights of linear layers in, by torchao: "int8" on every
            device, a byte a number with one scale for each row; "int4" or "fp8" on GPUs alone.

    Returns:
        `model`.

    Raises:
        ValueError: `weights` is no format, or not one for the device; the model is in training
            mode, cannot generate, or has been through this before.
        ImportError: torchao is missing.
        FileNotFoundError: a C++ compiler is missing.
    """
    if not isinstance(model, GenerationMixin):
        raise ValueError(f"{type(model).__name__} cannot generate; give a language model")
    if isinstance(model, _FastGeneration):
        raise ValueError("the model is optimized already; load it again to change the weights")
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    if model.device.type == "cpu":
        _ask_for_compiler()
    if weights is not None:
        _quantize(model, weights)
    elif model.device.type == "cpu" and torch.backends.mkldnn.is_available():
        dtypes = [torch.float32]
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            dtypes.append(torch.bfloat16)
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.weight.dtype in dtypes:
                _PackedLinear.take_over(module)
    if model.device.type == "cpu":
        if model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(_ATTENTION)
    else:  # transformers compiles steps over such a cache by itself
        model.generation_config.cache_implementation = "static"
        model.generation_config.max_cache_len = model.config.max_position_embeddings
    # The same name, since it is saved with a model.
    model.__class__ = type(
        type(model).__name__,
        (_FastGeneration, type(model)),
        {"__module__": type(model).__module__, "weight_format": weights},
    )
    return model


def _ask_for_compiler() -> None:
    # Not at the top: these take a tenth of a second, of everyone who imports the package.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise FileNotFoundError(
            "no C++ compiler is there to compile the step with; install g++, or name one in CXX"
        ) from None


class _FastGeneration(GenerationMixin):
    """Goes before a language model's own class."""

    weight_format: str | None
    _one_token: Any = None  # a _OneToken, once a text has been written

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """The loop of greedy search and sampling; `generate` has prepared the arguments."""
        cache: Any = model_kwargs.get("past_key_values")
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        is_ordinary = (
            input_ids.is_cpu
            and len(input_ids) == 1
            and type(cache) is DynamicCache
            and cache.get_seq_length() == 0
            and not getattr(cache, "_is_user_defined", False)
            and not torch.is_autocast_enabled("cpu")
            and (mask is None or bool(mask.all()))
            and not (synced_gpus or generation_config.return_dict_in_generate)
            and "inputs_embeds" not in model_kwargs
            and (positions is None or torch.equal(positions[0], torch.arange(input_ids.shape[1])))
        )
        if is_ordinary and self._one_token is None:
            with torch.inference_mode(False), torch.no_grad():
                self._one_token = _OneToken(self)
        one_token = self._one_token  # another thread may put its own there
        # It may be in use by another thread, or by a text that is being written in this one.
        if not is_ordinary or not one_token.lock.acquire(blocking=False):
            return super()._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus,
                streamer,
                **model_kwargs,
            )
        try:
            logits = self(input_ids, past_key_values=cache, logits_to_keep=1).logits
            one_token.begin(cache)
            while True:
                scores = logits_processor(input_ids, logits[:, -1].float())
                if generation_config.do_sample:
                    token = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)
                else:
                    token = scores.argmax(-1, keepdim=True)
                input_ids = torch.cat([input_ids, token], dim=-1)
                if streamer is not None:
                    streamer.put(token[0])
                if stopping_criteria(input_ids, None).all():
                    break
                logits = one_token.logits_after(token)
        finally:
            one_token.lock.release()
        if streamer is not None:
            streamer.end()
        return input_ids

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save as before; what torchao has made of the weights cannot be saved."""
        if self.weight_format is not None:
            raise ValueError(
                f"the weights are in {self.weight_format}; save the model before it is optimized"
            )
        super().save_pretrained(*args, **kwargs)


class _OneToken:
    """One compiled step of a language model, over keys and values in memory that stays."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.lock = threading.Lock()
        self._limit = config.max_position_embeddings
        self._memory = _Memory(config, model.dtype)
        self._is_seen = torch.ones(1, 1, 1, self._limit, dtype=torch.bool)

        def step(token: torch.Tensor, is_seen: torch.Tensor) -> torch.Tensor:
            self._memory.length = is_seen.shape[-1]
            return model(
                token,
                attention_mask=is_seen,
                position_ids=self._memory.position[None],
                past_key_values=self._memory,
            ).logits

        # What is compiled belongs to a function's code, and each model needs its own. The guards
        # that tell cases apart take a tenth of a step; all that they look at stays as it is.
        step.__code__ = step.__code__.replace()
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        self._step = torch.compile(step, fullgraph=True, options=options)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model compiles its own."""

    def begin(self, read: DynamicCache) -> None:
        """Take over the keys and values of a text that has been read."""
        self._length = read.get_seq_length()
        for layer, theirs in enumerate(read.layers):
            self._memory.keys[layer][:, :, : self._length] = theirs.keys
            self._memory.values[layer][:, :, : self._length] = theirs.values

    def logits_after(self, token: torch.Tensor) -> torch.Tensor:
        """Read `token` (1, 1); return the scores of the next one, (1, 1, V)."""
        if self._length >= self._limit:
            raise_past_limit(self._length + 1, self._limit)
        self._memory.position.fill_(self._length)
        self._length += 1
        is_seen = self._is_seen[..., : self._length]  # its length is all that changes
        torch._dynamo.mark_dynamic(is_seen, 3, min=2, max=self._limit)
        return self._step(token, is_seen)


class _Memory(Cache):
    """Keys and values of one text, as long as a model's positions, of which the first are shown."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        super().__init__(layers=[])
        # One place more than is ever shown: a compiler would take the whole for another case.
        room = config.max_position_embeddings + 1
        size = (1, config.num_attention_heads, room, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(size, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(size, dtype=dtype) for _ in layers]
        self.position = torch.zeros(1, dtype=torch.long)  # where the next token's go
        self.length = 0  # how many are shown, that one included

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys.index_copy_(2, self.position, key_states)
        values.index_copy_(2, self.position, value_states)
        return keys[:, :, : self.length], values[:, :, : self.length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length - 1

    def get_max_length(self, layer_idx: int = 0) -> int:
        return self.keys[layer_idx].shape[2] - 1


class _PackedLinear(nn.Linear):
    """Keeps a copy of its weight in the order in which oneDNN reads it."""

    packed: "_Packed"

    @classmethod
    def take_over(cls, linear: nn.Linear) -> None:
        """Make `linear` one of these."""
        linear.__class__ = cls
        linear.packed = _Packed(linear.weight.detach())  # type: ignore[assignment]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if is_plain_inference(input, self.weight):
            if not torch.compiler.is_compiling():
                return by_onednn(input, self.packed.weight, self.bias)
            if is_one_token(input):
                return written_out(input, self.weight, self.bias)
        return super().forward(input)


class _Packed:
    """A weight in oneDNN's order, which torch cannot copy; copies of a layer share it."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Packed":
        return self


class _QuantizedLinear(nn.Linear):
    """Has a weight that torchao keeps in few bits."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() and input.is_cpu and is_one_token(input):
            # Not in memory: the loop that sums turns each number back on its way.
            return written_out(input, self.weight.dequantize(), self.bias)
        return super().forward(input)


def _quantize(model: PreTrainedModel, weights: str) -> None:
    """Keep the weights of linear layers in the format `weights`."""
    if weights not in FORMATS:
        raise ValueError(f"weights={weights!r} is no format; give one of {', '.join(FORMATS)}")
    if weights in _ON_GPU_ALONE and model.device.type == "cpu":
        raise ValueError(f"weights={weights!r} needs a GPU; give 'int8' on a CPU")
    try:
        from torchao import quantization
    except ImportError:
        raise ImportError(f"weights={weights!r} needs torchao; pip install torchao") from None
    quantization.quantize_(model, getattr(quantization, FORMATS[weights])())
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = _QuantizedLinear


def _one_token_or_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as torch's kernel computes it; of one token in compiled code, written out.

    The kernel reads the keys of each head on its own, and on CPUs in bfloat16 slowly; written out,
    the sums become loops at the speed of memory. Shapes are those of `masked_attention`.
    """
    one_token = query.shape[0] == query.shape[2] == 1 and query.is_cpu
    if not (one_token and torch.compiler.is_compiling()):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = ((query * scaling).to(wide) * key.to(wide)).sum(-1)  # (1, H, S)
    if attention_mask is not None:
        is_seen = attention_mask[:, :, 0]  # (1, 1, S)
        scores = scores.masked_fill(~is_seen, torch.finfo(wide).min)
    weights = torch.softmax(scores, dim=-1)  # (1, H, S)
    gathered = (weights[..., None] * value.to(wide)).sum(-2)  # (1, H, D)
    return gathered[:, None].to(query.dtype), None  # (1, T=1, H, D)


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _one_token_or_sdpa)
ALL_MASK_ATTENTION_FUNCTIONS.register(_ATTENTION, sdpa_mask)
