"""Read by each Python that a tool under `hf-scratch-gpt with` starts: it registers the classes."""

import contextlib
import sys
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path

with contextlib.suppress(ImportError):  # a Python of another environment
    import_module("hf_scratch_gpt")

# This file hides another of its name, which a system or an environment may have.
_others = [place for place in sys.path if place != str(Path(__file__).parent)]
_hidden = PathFinder.find_spec("sitecustomize", _others)
if _hidden is not None and _hidden.loader is not None:
    _hidden.loader.exec_module(sys.modules["sitecustomize"])
