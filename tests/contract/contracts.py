"""The contract tests run within a test, in a project of the strictest settings."""

import os
from pathlib import Path

import pytest

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
