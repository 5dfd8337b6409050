"""What the commands share."""

import sys
from collections.abc import Callable


def run_command(work: Callable[[], None]) -> int:
    """Do `work`; return the exit code of a command, 1 after an error told in one line."""
    try:
        work()
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was changed", file=sys.stderr)
        return 130
    return 0
