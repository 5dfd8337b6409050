"""What the models need from transformers, looked up once, when they are imported.

A saved model may meet a transformers that is years newer. transformers renames things: 5.24 calls
`cache` what 5.23 called `past_key_values`, and code that knew the old name alone wrote wrong text
without an error. Here it becomes one ImportError.
"""

import inspect
from collections.abc import Iterator
from pkgutil import resolve_name

import transformers

TESTED = "5.24.0"

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
    """Raise an ImportError if transformers lacks something that the models rely on."""
    lacking = list(_lacking())
    if lacking:
        raise ImportError(
            f"transformers {transformers.__version__} does not fit this model: it lacks "
            f"{', '.join(lacking)}. The model was tested with transformers {TESTED}: pip install "
            f"transformers=={TESTED}. For a newer transformers, upgrade hf_scratch_gpt; a saved "
            "model is refreshed by from_pretrained and save_pretrained of the new version"
        )


check_transformers()
