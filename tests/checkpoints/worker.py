"""A process that runs commands one after another, so that what crashes or hangs harms no test."""

import importlib
import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS, MEGABYTES, CHARACTERS = 10, 300, 2000
_PATIENCE = 60  # seconds on the clock: other tests may have the processors


@dataclass
class Outcome:
    """How a command ended; `code` is None if it did not end or took its process with it."""

    code: int | None
    text: str = ""
    seconds: float = 0.0
    megabytes: float = 0.0

    def faults(self) -> list[str]:
        """What no command may do, whatever it is given."""
        checks = {
            "crashed or hung": self.code is None,
            f"took {self.seconds:.0f} s": self.seconds > SECONDS,
            f"took {self.megabytes:.0f} MB": self.megabytes > MEGABYTES,
            "showed a traceback": "Traceback" in self.text or "panicked" in self.text,
            f"told {len(self.text)} characters": self.code != 0 and len(self.text) > CHARACTERS,
            "steers the terminal": any(
                not sign.isprintable() and sign not in "\n\r\t" for sign in self.text
            ),
            "failed without a message": self.code not in (0, None) and "error: " not in self.text,
        }
        return [fault for fault, is_there in checks.items() if is_there]


class Worker:
    """Runs commands in a process of its own, which starts anew after a crash or a hang."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, function: str, *arguments: str) -> Outcome:
        """Call `function`, "module:name", with a list of arguments."""
        if self._process is None:
            command = [sys.executable, "-W", "ignore", "-m", "tests.checkpoints.worker"]
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._process = subprocess.Popen(command, cwd=ROOT, **pipes)
            self._process.stdout.readline()  # it is ready
        self._process.stdin.write(json.dumps([function, *arguments]) + "\n")
        self._process.stdin.flush()
        is_done, _, _ = select.select([self._process.stdout], [], [], _PATIENCE)
        reply = self._process.stdout.readline() if is_done else ""
        if not reply:
            self.close()
            return Outcome(None)
        return Outcome(**json.loads(reply))

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _memory(kind: str) -> int:
    """Kilobytes of this process: VmRSS now, VmHWM at its peak, VmSize with what is untouched."""
    return int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0])


def _call(function: str, arguments: list[str]) -> int:
    module, _, name = function.partition(":")
    try:
        command = getattr(importlib.import_module(module), name)
        if module.endswith("cli"):
            sys.argv = ["hf-scratch-gpt", *arguments]
            return command() or 0
        return command(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1


def _serve() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    output = tempfile.TemporaryFile()  # noqa: SIM115  # it stays open
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    # What a command imports when it begins is no part of what it takes.
    for module in ("cli.models", "checkpoints.convert", "checkpoints.readers"):
        importlib.import_module(f"hf_scratch_gpt.{module}")
    most = _memory("VmSize") * 1024 + (4 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    replies.write("ready\n")
    for line in sys.stdin:
        function, *arguments = json.loads(line)
        output.seek(0)
        output.truncate()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, start = _memory("VmRSS"), time.process_time()
        code = _call(function, arguments)
        seconds, peak = time.process_time() - start, _memory("VmHWM") - before
        sys.stdout.flush()
        sys.stderr.flush()
        output.seek(0)
        text = output.read().decode(errors="backslashreplace")
        outcome = Outcome(code, text, seconds, peak / 1024)
        replies.write(json.dumps(vars(outcome)) + "\n")


if __name__ == "__main__":
    _serve()
