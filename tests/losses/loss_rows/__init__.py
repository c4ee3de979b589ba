"""One row per loss and option: how to call it on pairs. ``test_every_loss`` holds its rules to all.

A row's function takes the policy's values of chosen and rejected [B], the references', the counts
and options (``beta``, ``reduction``); it leaves out what its loss does not take. Each module here
has a dictionary ``ROWS``; names begin with the loss's own, then an underscore and the variant.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import NamedTuple


class Row(NamedTuple):
    """A loss and which of the common rules do not apply to it."""

    call: Callable
    has_beta: bool = True
    # Pairs of the batch do not see each other: their order changes nothing.
    is_permutable: bool = True
    # False where the loss itself, a square or an exponential, is beyond float32 at a margin of 1e4.
    is_bounded: bool = True
    # False where stop-gradients make the gradient another one than that of the value.
    has_gradient_of_value: bool = True


def paired(loss, *, has_beta=True, is_permutable=True, is_bounded=True, **fixed):
    """A loss of policy and reference sums."""

    def call(chosen, rejected, ref_chosen, ref_rejected, *counts, **options):
        if not has_beta:
            options.pop("beta", None)
        return loss(chosen, rejected, ref_chosen, ref_rejected, **fixed, **options)

    return Row(call, has_beta, is_permutable, is_bounded)


def counted(loss, *, has_beta=True, **fixed):
    """A loss of policy sums and token counts."""

    def call(chosen, rejected, ref_chosen, ref_rejected, *counts, **options):
        if not has_beta:
            options.pop("beta", None)
        return loss(chosen, rejected, *counts, **fixed, **options)

    return Row(call, has_beta)


def full(loss, *, has_beta=True, **fixed):
    """A loss of policy and reference sums and token counts."""

    def call(*tensors, **options):
        if not has_beta:
            options.pop("beta", None)
        return loss(*tensors, **fixed, **options)

    return Row(call, has_beta)


def collect() -> dict[str, Row]:
    """The rows of all modules of this package."""
    rows = {}
    for module in pkgutil.iter_modules(__path__):
        found = importlib.import_module(f"{__name__}.{module.name}").ROWS
        assert not rows.keys() & found.keys(), f"{module.name}: {rows.keys() & found.keys()}"
        rows |= found
    return rows
