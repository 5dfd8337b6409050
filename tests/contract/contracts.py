"""The contract tests run within a test, in a project of the strictest settings."""

import os
import shutil
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[2] / "hf_scratch_gpt" / "model"
STRICT = """[pytest]
strict = true
filterwarnings = error
addopts = -m 'not long'
markers = long: a marker of the project
"""


class Reports:
    """What was passed, failed and skipped, by the name of the test: "test_saving.py::test_x"."""

    def __init__(self) -> None:
        self.passed: set[str] = set()
        self.failed: dict[str, str] = {}
        self.skipped: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("/")[2]
        if report.failed:
            self.failed[name] = str(report.longrepr)
        elif report.skipped:
            self.skipped[name] = report.longrepr[2]
        elif report.when == "call":
            self.passed.add(name)


def run_pytest(folder: Path, *options: str) -> tuple[int, Reports]:
    """Run the contract tests in this process; pytest's exit code, and the reports."""
    (folder / "pytest.ini").write_text(STRICT)
    reports, before = Reports(), Path.cwd()
    os.chdir(folder)  # or pytest would take the fixtures of the tests where it is called
    try:
        how = ("-q", "-p", "no:cacheprovider", "--pyargs", "hf_scratch_gpt.contract")
        code = pytest.main([*how, *options], plugins=[reports])
    finally:
        os.chdir(before)
    return code, reports


def run_contract(folder: Path, name: str, *options: str) -> Reports:
    """Run the contract tests on the class `name`, in this process."""
    code, reports = run_pytest(folder, "--model-class", name, *options)
    assert code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), code
    return reports


def copy_of_model(package: Path, replaced: list[tuple[str, str, str]]) -> str:
    """Copy our model to a package of that name, as a new plugin begins; the name of its class."""
    name = package.name
    shutil.copytree(MODEL, package, ignore=shutil.ignore_patterns("__pycache__"))
    for path in sorted(package.iterdir()):
        text = path.read_text()
        for kind, old, new in replaced:
            if path.name == f"{kind}_scratch_gpt.py":
                assert old in text, old
                text = text.replace(old, new.replace("PACKAGE", name))
        text = text.replace("scratch_gpt", name).replace("ScratchGPT", name.capitalize())
        path.unlink()
        path.with_name(path.name.replace("scratch_gpt", name)).write_text(text)
    return f"{name}.modeling_{name}:{name.capitalize()}ForCausalLM"
