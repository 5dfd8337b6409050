"""transformers' server around one model, with requests held to the model's positions."""

import sys
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager, TimedModel
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerationState

from .models import load

# The server's default of max_new_tokens is the model's own, but 1,024 if that is less.
_AS_MANY_AS_FIT = sys.maxsize
_PAGE = 256  # tokens in a page of the cache
# Settings that continuous batching applies to all texts alike.
_SHARED = (
    *("do_sample", "temperature", "top_p", "top_k"),
    *("repetition_penalty", "sequence_bias", "stop_strings"),
)


def build_app(
    model: str, at_once: int = 1, *, fast: bool | None = False, weights: str | None = None
) -> FastAPI:
    """Load a model, and build the server of it.

    Args:
        model: folder or Hub id of a model of ours, or of a GPT-2, which is converted.
        at_once: texts written together, by continuous batching; 1 writes one after another.
        fast, weights: see `models.load`.
    """
    manager = _OneModel(model, fast, weights)
    network, _ = manager.load_model_and_processor(manager.process_model_name(model))
    pages = at_once * -(-network.config.max_position_embeddings // _PAGE)
    batching = ContinuousBatchingConfig(page_size=_PAGE, num_blocks=pages, max_batch_tokens=512)
    state = _BoundedGeneration(continuous_batching=at_once > 1, cb_config=batching)
    manager.generation = state
    app = build_server(
        manager,
        ChatCompletionHandler(manager, state),
        completion_handler=CompletionHandler(manager, state),
        response_handler=ResponseHandler(manager, state),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(manager, state),
        generation_state=state,
    )

    @app.exception_handler(ValueError)
    async def _refuse(_request: Request, error: ValueError) -> JSONResponse:
        content = {"message": str(error), "type": "invalid_request_error"}
        return JSONResponse({"error": content}, status_code=400)

    return app


class _OneModel(ModelManager):
    """Loads the model that is served; the class is found without a name in `transformers`."""

    def __init__(self, model: str, fast: bool | None, weights: str | None) -> None:
        super().__init__()
        self.force_model = model  # requests for others are refused
        self.fast, self.weights = fast, weights
        self.generation: GenerationState | None = None

    def load_model_and_processor(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The model and its tokenizer, loaded once; a `name` of another is refused."""
        place = self.force_model
        if name == self.process_model_name(place) and name not in self.loaded_models:
            model, tokenizer = load(place, self.fast, self.weights)
            model.generation_config.max_new_tokens = _AS_MANY_AS_FIT
            self.loaded_models[name] = TimedModel(
                model, -1, tokenizer, on_unload=lambda: self.loaded_models.pop(name, None)
            )
        return super().load_model_and_processor(name, *args, **kwargs)

    def shutdown(self) -> None:
        """Unload the model; the loop of a batch ends too, as it would keep the process alive."""
        if self.generation is not None:
            self.generation.shutdown()
        super().shutdown()


class _BoundedGeneration(GenerationState):
    """transformers' ways to generate, each behind a check of what it is asked for."""

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        return _Bounded(super().get_manager(model_id, use_cb), use_cb)


class _Bounded:
    """One way to generate; a request that would end the loop of a batch is refused before it."""

    def __init__(self, manager: Any, shared: bool) -> None:
        self._manager, self._shared = manager, shared

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def init_cb(self, model: Any, _config: Any) -> None:
        # transformers would write all texts by the settings of the first request.
        self._manager.init_cb(model, model.generation_config)

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, config: Any, **others: Any
    ) -> Any:
        self._settle(model, inputs, config)
        return self._manager.generate_streaming(model, processor, inputs, config, **others)

    def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, config: Any, **others: Any
    ) -> Any:
        self._settle(model, inputs, config)
        return self._manager.generate_non_streaming(model, processor, inputs, config, **others)

    def _settle(self, model: Any, inputs: Mapping[str, Any], config: GenerationConfig) -> None:
        """Set what the request leaves open; raise a ValueError for what cannot be done."""
        ids = inputs["input_ids"]  # a list with continuous batching, else (1, T)
        tokens = len(ids) if isinstance(ids, list) else ids.shape[-1]
        _fit(config, tokens, model.config.max_position_embeddings)
        own = model.generation_config
        # transformers' server reads a temperature, but samples only if the model does so by itself.
        if (config.temperature, config.top_p) != (own.temperature, own.top_p):
            config.do_sample = config.temperature != 0
        if not config.do_sample:
            config.temperature = config.top_p = None
        if config.repetition_penalty == 1:  # a frequency_penalty of 0
            config.repetition_penalty = own.repetition_penalty
        other = [
            name
            for name in _SHARED
            if (getattr(config, name) or None) != (getattr(own, name) or None)
        ]
        if self._shared and other:
            raise ValueError(
                f"texts that are written together share the model's {', '.join(other)}; leave out "
                "temperature, top_p, stop and penalties, or serve without --at-once"
            )


def _fit(config: GenerationConfig, tokens: int, limit: int) -> None:
    """Hold a prompt of so many tokens, and what follows it, to the model's positions."""
    room = limit - tokens
    if not tokens or room < 1:
        raise ValueError(
            f"the prompt has {tokens} tokens; give 1 to {limit - 1}, as the model has {limit} "
            "positions"
        )
    wanted = config.max_new_tokens
    if wanted is None and config.max_length is not None:
        wanted, config.max_length = config.max_length - tokens, None
    wanted = room if wanted in (None, _AS_MANY_AS_FIT) else wanted
    if not 0 < wanted <= room:
        raise ValueError(
            f"{wanted} tokens are asked for after a prompt of {tokens}; ask for 1 to {room}, as "
            f"the model has {limit} positions"
        )
    config.max_new_tokens = wanted
