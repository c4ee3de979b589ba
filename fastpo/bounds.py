"""Values held within bounds, with a gradient that is the same in every version of torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hold(x: Tensor, low: float | Tensor = -math.inf, high: float | Tensor = math.inf) -> Tensor:
    """``x`` within [low, high]: its own gradient on the closed interval, none beyond.

    The values are those of ``torch.clamp``, whose gradient at a bound is 1 before torch 2.14 and 0
    since. Real inputs meet their bounds (a ratio of exactly 1 + eps, a policy that still equals its
    reference), so everything that may carry a gradient is held by this function. NaN stays, with
    its gradient.

    Args:
        x: of any shape and float dtype.
        low: a number, or a tensor that broadcasts to ``x``; both bounds of one kind.
        high: likewise, >= low.

    Example:
        >>> x = torch.tensor([0.5, 1.0, 1.5], requires_grad=True)
        >>> hold(x, high=1.0).sum().backward()
        >>> x.grad
        tensor([1., 1., 0.])
    """
    return torch.where((x < low) | (x > high), x.detach().clamp(low, high), x)
