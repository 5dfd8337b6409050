"""What the models rely on in transformers is looked up when they are imported."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from transformers import masking_utils, modeling_outputs
from transformers.utils import output_capturing

from hf_scratch_gpt.model.configuration_scratch_gpt import TESTED, check_transformers

# Makes transformers one that says `past_key_values`, then imports what the arguments name.
OLDER = """
import sys
from transformers import masking_utils

def create_causal_mask(config, inputs_embeds, attention_mask, past_key_values, **kwargs):
    return None

masking_utils.create_causal_mask = create_causal_mask
for path, name in zip(sys.argv[1::2], sys.argv[2::2]):
    sys.path.insert(0, path)
    try:
        __import__(name)
    except ImportError as error:
        print(error)
"""


def of_the_next_transformers(config, inputs_embeds, attention_mask, kv_states, **kwargs):
    """`create_causal_mask` after one more renaming."""


@pytest.mark.parametrize(
    ("module", "name", "replacement", "message"),
    [
        (
            *(masking_utils, "create_causal_mask", of_the_next_transformers),
            "the argument 'cache' of create_causal_mask",
        ),
        (
            *(modeling_outputs, "CausalLMOutputWithPast", modeling_outputs.CausalLMOutput),
            "the argument 'cache' of CausalLMOutputWithPast",
        ),
        (output_capturing, "capture_outputs", None, r"\.output_capturing\.capture_outputs"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, module, name, replacement, message):
    if replacement is None:
        monkeypatch.delattr(module, name)
    else:
        monkeypatch.setattr(module, name, replacement)
    with pytest.raises(ImportError, match=message) as raised:
        check_transformers()
    text = str(raised.value)
    assert f"transformers {transformers.__version__} does not fit" in text
    assert f"pip install transformers=={TESTED}" in text


def test_an_import_beside_another_transformers_is_one_error(saved_model):
    package = (str(Path(__file__).parents[2]), "hf_scratch_gpt")
    saved = (str(saved_model.parent), f"{saved_model.name}.modeling_scratch_gpt")
    command = [sys.executable, "-c", OLDER, *saved, *package]
    run = subprocess.run(command, capture_output=True, text=True)
    errors = run.stdout.splitlines()
    assert len(errors) == 2, run.stderr
    for error in errors:
        assert error.startswith("transformers ")
        assert "the argument 'cache' of create_causal_mask" in error


def test_pyproject_asks_for_no_older_transformers_than_was_tested():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"transformers>={TESTED.removesuffix(".0")},' in text
    assert "cache" in inspect.signature(transformers.GPT2LMHeadModel.forward).parameters
