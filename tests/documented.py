"""Every public function of tensors, with the arguments of the example in its own docstring."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import inspect
import io
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastpo

_PACKAGES = (
    "fastpo", "fastpo.losses", "fastpo.advantages", "fastpo.surrogates", "fastpo.weights",
    "fastpo.metrics", "fastpo.diffusion", "fastpo.diffusion.losses", "fastpo.diffusion.weights",
    "fastpo.diffusion.advantages", "fastpo.diffusion.guidance", "fastpo.diffusion.targets",
    "fastpo.diffusion.data",
)  # fmt: skip


def _is_public(function: Any, package: str) -> bool:
    """A function of ours that the package shows: one in ``__all__``, or one of a module's own."""
    module = importlib.import_module(package)
    named = getattr(module, "__all__", None)
    if not inspect.isfunction(function) or not function.__module__.startswith("fastpo"):
        return False
    return named is not None or function.__module__ == package


@cache
def functions() -> dict[str, Callable]:
    """Public functions by the name a user writes."""
    found: dict[Callable, str] = {}
    for package in _PACKAGES:
        module = importlib.import_module(package)
        names = getattr(module, "__all__", [name for name in vars(module) if name[0] != "_"])
        for name in names:
            if _is_public(getattr(module, name), package):
                found.setdefault(getattr(module, name), f"{package}.{name}")
    return {name: function for function, name in found.items()}


@cache
def calls(name: str) -> list[tuple[tuple, dict]]:
    """Arguments of each call of a function in its example."""
    function, recorded = functions()[name], []

    def recorder(*args, **kwargs):
        recorded.append((args, kwargs))
        return function(*args, **kwargs)

    short = function.__name__
    modules = [m for n, m in list(sys.modules.items()) if n.partition(".")[0] == "fastpo"]
    holders = [m for m in modules if getattr(m, short, None) is function]
    packages = {
        n: getattr(fastpo, n) for n in fastpo.__all__ if inspect.ismodule(getattr(fastpo, n))
    }
    for holder in holders:
        setattr(holder, short, recorder)
    try:
        known = {
            **packages,
            "torch": torch,
            "fastpo": fastpo,
            **vars(sys.modules[function.__module__]),
        }
        finder = doctest.DocTestFinder(recurse=False)
        with contextlib.redirect_stdout(io.StringIO()):
            for example in finder.find(function, short, globs=known):
                doctest.DocTestRunner(verbose=False).run(example)
    finally:
        for holder in holders:
            setattr(holder, short, function)
    return recorded


def change(value: Any, of_tensor: Callable[[Tensor], Any]) -> Any:
    """The same nest of containers with each tensor replaced."""
    if isinstance(value, Tensor):
        return of_tensor(value)
    if isinstance(value, dict):
        return {key: change(x, of_tensor) for key, x in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(change(x, of_tensor) for x in value))
    if isinstance(value, (list, tuple)):
        return type(value)(change(x, of_tensor) for x in value)
    return value


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a nest, in order."""
    found: list[Tensor] = []
    change(value, lambda x: found.append(x) or x)
    return found


class Ops(TorchDispatchMode):
    """The first call of every op of ours."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastpo":
            self.calls.setdefault(func._schema.name, (func, args))
        return func(*args, **(kwargs or {}))
