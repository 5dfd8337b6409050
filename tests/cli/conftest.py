"""The command line, called in this process."""

import sys

import pytest

from hf_scratch_gpt.cli import main


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the command line in a terminal of 80 columns; its exit code, output and errors."""

    def call(*arguments: object, columns: int = 80):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "argv", ["hf-scratch-gpt", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code or 0, *capsys.readouterr()

    return call


@pytest.fixture
def assert_refused(run):
    """Check that a command ends with exit code 2 and one line that contains a message."""

    def check(message: str, *arguments: object):
        code, _, error = run(*arguments)
        assert code == 2
        assert "Traceback" not in error
        line = error.strip().splitlines()[-1]
        assert line.startswith("error: ")
        assert message in line

    return check
