"""What the commands share."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def run_command(work: Callable[[], None]) -> int:
    """Do `work`; return the exit code of a command, 1 after an error told in one line."""
    try:
        with _terminated_as_interrupted():
            work()
    except (OSError, ValueError) as error:
        print(f"error: {_printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was changed", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Take SIGTERM for Ctrl-C, so that what is unfinished is removed."""
    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _printable(text: str) -> str:
    """`text` with what would steer a terminal written as escapes; names come from files."""
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text
    )
