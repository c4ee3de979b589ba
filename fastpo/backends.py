"""Which kernels serve a device: ``cuda``, ``cpu``, ``sim`` (CUDA code on the CPU), ``reference``.

The choice is made by device alone and never changes silently: a device whose kernels are missing is
an error that says why. ``use`` asks for a backend by name, for tests and for comparisons.

>>> import fastpo
>>> fastpo.backends.name(torch.device("cpu"))
'cpu'
>>> with fastpo.backends.use("reference"):
...     fastpo.backends.name(torch.device("cpu"))
'reference'
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from fastpo import reference
from fastpo._native import NativeKernels

NAMES = ("cuda", "cpu", "sim", "reference")
_DEVICES = {"cuda": ("cuda",), "cpu": ("cpu",), "sim": ("cpu",), "reference": ("cpu", "cuda")}

# Read by every op, in autograd's own threads too, where a context variable would not be seen.
_override: str | None = None


class BackendError(RuntimeError):
    """A backend was asked for that cannot serve the call."""


@cache
def _load(name: str) -> tuple[Any, str]:
    """The kernels of a backend and an empty string, or None and why they are missing."""
    if name == "reference":
        return reference, ""
    try:
        return NativeKernels(importlib.import_module(f"fastpo._{name}"), name), ""
    except ImportError as error:
        return None, f"the extension module fastpo._{name} does not load ({error})"


def why_not(backend: str, device: torch.device | str) -> str:
    """Why ``backend`` cannot serve ``device``; an empty string if it can.

    >>> why_not("cpu", "cuda")
    'cpu kernels serve cpu tensors, not cuda'
    """
    device = torch.device(device)
    if backend not in NAMES:
        return f"no such backend; there are {', '.join(NAMES)}"
    if device.type not in _DEVICES[backend]:
        return (
            f"{backend} kernels serve {' and '.join(_DEVICES[backend])} tensors, not {device.type}"
        )
    return _load(backend)[1]


def name(device: torch.device | str) -> str:
    """The backend that serves ``device``: its own, or the one set by ``use``.

    Raises:
        BackendError: it cannot serve the device, with the reasons of every backend.
    """
    device = torch.device(device)
    chosen = _override or device.type
    if why_not(chosen, device):
        reasons = "; ".join(f"{b}: {why_not(b, device) or 'available'}" for b in NAMES)
        remedy = (
            'Reinstall with the CUDA toolkit on PATH, or ask for another by backends.use("...").'
            if device.type in _DEVICES
            else 'Move them with .to("cpu") or .to("cuda").'
        )
        raise BackendError(
            f"fastpo has no {chosen} kernels for {device} tensors ({reasons}). {remedy}"
        )
    return chosen


def kernels(device: torch.device) -> Any:
    """The kernels that serve ``device``, an object with the functions of ``fastpo.reference``."""
    return _load(name(device))[0]


def has_cuda() -> bool:
    """Whether the CUDA module is there and a CUDA device with it."""
    return not _load("cuda")[1] and torch.cuda.is_available()


def sim_thread_order(order: int) -> None:
    """Run the simulator's threads in ascending (0), descending (1) or shuffled (2) order."""
    importlib.import_module("fastpo._sim").set_thread_order(order)


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Serve every call inside the block by ``backend``, for all threads of the process.

    Raises:
        BackendError: there is no such backend here.
    """
    global _override
    reason = f"there are {', '.join(NAMES)}" if backend not in NAMES else _load(backend)[1]
    if reason:
        raise BackendError(f"backend {backend!r} is not available: {reason}")
    previous, _override = _override, backend
    try:
        yield
    finally:
        _override = previous
