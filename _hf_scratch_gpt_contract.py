"""The options of pytest for the contract tests; see `hf_scratch_gpt.contract`.

With `--pyargs` pytest reads options before it finds the package, so they come from this plugin. It
stands outside of the package, as pytest imports it in every project: it costs nothing, and it
registers no model there. It asserts nothing: PYTEST_DONT_REWRITE.
"""

from typing import Any


def pytest_addoption(parser: Any) -> None:
    """Add the options that choose the model."""
    group = parser.getgroup("hf_scratch_gpt.contract", "contract tests of causal language models")
    group.addoption(
        "--model-class",
        metavar="PACKAGE.MODULE:CLASS",
        help="the causal language model to test, such as transformers:LlamaForCausalLM",
    )
    group.addoption(
        "--model-config",
        metavar="JSON",
        default="{}",
        help="fields of its configuration beside the tiny sizes, such as '{\"hidden_size\": 48}'",
    )
