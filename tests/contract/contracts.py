"""The contract tests run within a test, in a project of the strictest settings."""

from pathlib import Path

import pytest

STRICT = "[pytest]\nstrict = true\nfilterwarnings = error\naddopts = -m 'not long'\n"


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


def run_contract(folder: Path, name: str, *options: str) -> Reports:
    """Run the contract tests on the class `name`, in this process."""
    settings = folder / "pytest.ini"
    settings.write_text(STRICT)
    reports = Reports()
    which = ("--pyargs", "hf_scratch_gpt.contract", "--model-class", name, *options)
    how = ("-q", "-c", str(settings), "-p", "no:cacheprovider")
    code = pytest.main([*how, *which], plugins=[reports])
    assert code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), code
    return reports
