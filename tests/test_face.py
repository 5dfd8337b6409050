"""What `import hf_scratch_gpt` does, each time in a fresh process."""

import os
import subprocess
import sys

import pytest

ASK = "; assert AutoConfig.for_model('scratch_gpt').model_type == 'scratch_gpt'"


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", *arguments, *(["-c", code] if code else [])]
    return subprocess.run(command, capture_output=True, text=True)


def test_it_imports_neither_torch_nor_transformers() -> None:
    done = run("import hf_scratch_gpt, sys; print({'torch', 'transformers'} & {*sys.modules})")
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import hf_scratch_gpt; from transformers import AutoConfig",
        "from transformers import AutoConfig; import hf_scratch_gpt",
        "from hf_scratch_gpt.model.modeling_scratch_gpt import ScratchGPTModel; "
        "from transformers import AutoConfig",
    ],
)
def test_auto_classes_and_servers_know_the_models_however_they_are_imported(code: str) -> None:
    done = run(f"{code}{ASK}; import transformers; print(transformers.ScratchGPTForCausalLM)")
    assert "modeling_scratch_gpt.ScratchGPTForCausalLM" in done.stdout, done.stderr


def test_every_public_name_is_there_and_a_wrong_one_is_an_attribute_error() -> None:
    import hf_scratch_gpt

    assert all(hasattr(hf_scratch_gpt, name) for name in hf_scratch_gpt.__all__)
    assert set(hf_scratch_gpt.__all__) <= {*dir(hf_scratch_gpt)}
    assert isinstance(hf_scratch_gpt.__version__, str)
    with pytest.raises(AttributeError, match="ScratchGTP"):
        _ = hf_scratch_gpt.ScratchGTP


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["generate"]])
def test_help_and_misuse_start_at_once(arguments: list[str]) -> None:
    def seconds() -> float:
        before = os.times()
        done = run("", "-X", "importtime", "-m", "hf_scratch_gpt", *arguments)
        assert done.returncode in (0, 2), done.stderr
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert not imported & {"torch", "transformers"}
        after = os.times()
        return after.children_user + after.children_system - before[2] - before[3]

    assert min(seconds() for _ in range(3)) < 1
