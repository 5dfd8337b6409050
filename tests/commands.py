"""Commands of the command line, called in this process with a list of arguments."""

from hf_scratch_gpt.cli import main


def _call(name: str, arguments: list[str]) -> int:
    """The exit code of a command."""
    try:
        main([name, *arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def convert(arguments: list[str]) -> int:
    return _call("convert", arguments)


def export(arguments: list[str]) -> int:
    return _call("export", arguments)


def verify(arguments: list[str]) -> int:
    return _call("verify", arguments)
