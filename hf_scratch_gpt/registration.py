"""Registration with transformers, put off until its Auto classes are loaded.

Importing transformers and torch takes seconds, which `hf-scratch-gpt --help` does not need.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto."
_WATCHED = ("transformers", "hf_scratch_gpt")


def register() -> None:
    """Make the classes known to transformers: to its Auto classes, and by their names in it.

    Servers look a class up by its name in `transformers`. vLLM calls this by its entry point, in
    each of its processes.
    """
    import transformers as host

    from .checkpoints.names import register_gpt2_rules
    from .model import modeling_scratch_gpt as models
    from .model.configuration_scratch_gpt import ScratchGPTConfig
    from .model.tokenization_scratch_gpt import ScratchGPTTokenizer

    host.AutoConfig.register(ScratchGPTConfig.model_type, ScratchGPTConfig, exist_ok=True)
    host.AutoTokenizer.register(
        ScratchGPTConfig, tokenizer_class=ScratchGPTTokenizer, exist_ok=True
    )
    for auto_class, model_class in {
        host.AutoModel: models.ScratchGPTModel,
        host.AutoModelForCausalLM: models.ScratchGPTForCausalLM,
        host.AutoModelForSequenceClassification: models.ScratchGPTForSequenceClassification,
        host.AutoModelForTokenClassification: models.ScratchGPTForTokenClassification,
        host.AutoModelForQuestionAnswering: models.ScratchGPTForQuestionAnswering,
    }.items():
        auto_class.register(ScratchGPTConfig, model_class, exist_ok=True)
        # Not on `host`: transformers replaces its module when its models are first imported.
        setattr(sys.modules["transformers"], model_class.__name__, model_class)
    setattr(sys.modules["transformers"], ScratchGPTConfig.__name__, ScratchGPTConfig)
    setattr(sys.modules["transformers"], ScratchGPTTokenizer.__name__, ScratchGPTTokenizer)
    # When a model is loaded, as it takes transformers 45 ms to make its table ready.
    models.ScratchGPTPreTrainedModel.register_rules = staticmethod(register_gpt2_rules)


def register_when_used() -> None:
    """Register as soon as transformers' Auto classes are there, which may be now."""
    if _auto_is_loaded():
        register()
    else:
        sys.meta_path.insert(0, _Watch())


def _auto_is_loaded() -> bool:
    return any(name.startswith(_AUTO) for name in sys.modules)


class _Watch(MetaPathFinder):
    """Sees the modules of transformers and of this package as they are imported.

    Registration waits for the end of the outermost import: before, a module that it needs may be
    imported by half.
    """

    def __init__(self) -> None:
        self._depth = 0

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders find; its import is counted."""
        if name.partition(".")[0] not in _WATCHED:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            loader.exec_module = partial(self._run, loader.exec_module)
        return spec

    def _run(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        self._depth += 1
        try:
            execute(module)
        finally:
            self._depth -= 1
        if self._depth == 0 and self in sys.meta_path and _auto_is_loaded():
            sys.meta_path.remove(self)
            register()
