"""A saved folder carries its code: it loads where this package cannot be imported."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from ..models import CLASSES, random_gpt2, random_model

MODEL = Path(__file__).parents[2] / "hf_scratch_gpt" / "model"
LOAD_EVERYTHING = """
import sys, warnings
warnings.simplefilter("error")
sys.modules["hf_scratch_gpt"] = None
try:
    import hf_scratch_gpt
except ImportError:
    pass
else:
    raise AssertionError("the package can be imported")
import torch, transformers
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()  # new heads have new weights, and it says so
folder, gpt2, ids = sys.argv[1], sys.argv[3], torch.tensor([[1, 2, 3]])
trust = {"trust_remote_code": True}
config = transformers.AutoConfig.from_pretrained(folder, **trust)
assert type(config).__name__ == "ScratchGPTConfig", config
config.save_pretrained(sys.argv[2] + "-config")  # alone, with all code that it names
model = transformers.AutoModel.from_config(
    transformers.AutoConfig.from_pretrained(sys.argv[2] + "-config", **trust), **trust
)
model(ids)
for name in ("", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"):
    model = getattr(transformers, "AutoModel" + name).from_pretrained(folder, **trust)
    assert type(model).__name__ == "ScratchGPT" + (name or "Model"), type(model)
    model(ids)
transformers.utils.logging.set_verbosity_warning()
model = transformers.AutoModelForCausalLM.from_pretrained(folder, **trust)
assert type(model).__module__.startswith("transformers_modules."), type(model)
names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
assert names["scratch_gpt"] == "ScratchGPTForCausalLM"
try:
    type(model).from_pretrained(gpt2)
except ValueError as error:
    assert "by the classes of the package hf_scratch_gpt" in str(error), error
else:
    raise AssertionError("random weights in place of a GPT-2's")
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **trust)
assert type(tokenizer).__name__ == "ScratchGPTTokenizer", type(tokenizer)
write = transformers.pipeline("text-generation", folder, **trust)
print(write("The cat", max_new_tokens=5, do_sample=False)[0]["generated_text"])
model.save_pretrained(sys.argv[2])
tokenizer.save_pretrained(sys.argv[2])
"""


def load_everything(folder: Path, save_to: Path) -> str:
    """Text generated in a fresh process; fails if anything there does not load or warns."""
    gpt2 = save_to.parent / "gpt2"
    random_gpt2(n_layer=1).save_pretrained(gpt2)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", LOAD_EVERYTHING, str(folder), str(save_to), str(gpt2)]
    options = dict(cwd=save_to.parent, env=environment, capture_output=True, text=True)
    run = subprocess.run(command, **options)
    assert run.returncode == 0, run.stderr
    assert not run.stderr, run.stderr
    return run.stdout


def test_every_auto_class_loads_without_the_package(converted_tiny, tmp_path):
    text = load_everything(converted_tiny, tmp_path / "again")
    assert text.startswith("The cat")
    # what that process saved carries its code on
    assert load_everything(tmp_path / "again", tmp_path / "third") == text


def test_saved_folder_holds_the_code(converted_tiny):
    names = {path.name for path in converted_tiny.glob("*.py")}
    assert names == {path.name for path in MODEL.glob("*_scratch_gpt.py")}
    auto_map = json.loads((converted_tiny / "config.json").read_text())["auto_map"]
    for reference in auto_map.values():
        module, name = reference.split(".")
        assert f"class {name}(" in (converted_tiny / f"{module}.py").read_text()


@pytest.mark.parametrize("model_class", CLASSES)
@torch.no_grad()
def test_auto_classes_find_the_package_when_it_is_imported(model_class, tmp_path):
    model = random_model(model_class)
    model.save_pretrained(tmp_path)
    task = model_class.__name__.removeprefix("ScratchGPT").removeprefix("Model")
    auto_class = getattr(transformers, f"AutoModel{task}")
    assert type(auto_class.from_pretrained(tmp_path)) is model_class
    assert type(auto_class.from_config(model.config)) is model_class


def test_saved_code_imports_only_what_users_have():
    allowed = ("torch", "transformers", "tiktoken", "huggingface_hub", "tokenizers")
    for path in MODEL.glob("*_scratch_gpt.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            for name in (name.split(".")[0] for name in names):
                assert name in allowed or name in sys.stdlib_module_names, (path.name, name)
