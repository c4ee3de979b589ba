"""Modules imported when they are first asked for: ``fastpo.data.pairs`` after ``import fastpo``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

# A program says in one line that torch is missing; what is imported raises as it always does.
if find_spec("torch") is None and Path(sys.argv[0] if sys.argv else "").name in ("-m", "fastpo"):
    raise SystemExit("fastpo: torch is not installed. Remedy: pip install torch")


def submodules(package: str) -> Callable[[str], ModuleType]:
    """The ``__getattr__`` of a package whose modules need more than torch, or are seldom used."""

    def load(name: str) -> ModuleType:
        path = f"{package}.{name}"
        if name.startswith("_") or find_spec(path) is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(path)

    return load
