"""Switches that put fastpo into other libraries, one module per library."""

from __future__ import annotations

from fastpo import _lazy


class IntegrationError(RuntimeError):
    """A library is absent, of an untested version, or already patched by somebody else."""


__all__ = ["IntegrationError"]

__getattr__ = _lazy.submodules(__name__)
