"""The one ``torch.library`` namespace, and how an op is put into it."""

from __future__ import annotations

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("fastpo", "DEF")


def register(schema: str, implementation: Callable, fake: Callable) -> Callable:
    """Define ``fastpo::<schema>`` for every device and return the callable op.

    ``Library.define`` with a plain implementation costs 15 us a call where ``custom_op`` costs 65.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastpo::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.fastpo, name)
