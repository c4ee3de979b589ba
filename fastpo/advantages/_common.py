"""What the functions of this package share: checks, and types widened without gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastpo.checks import check_tensors


def fail(function: str, argument: str, expected: str, got: object, remedy: str) -> ValueError:
    text = f"fastpo.advantages.{function}: {argument}: expected {expected}, got {got}. {remedy}"
    return ValueError(text)


def floats(*tensors: Tensor) -> list[Tensor]:
    """Detached, in one dtype: float32, or float64 if any is."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    dtype = torch.float64 if wide else torch.float32
    return [tensor.detach().to(dtype) for tensor in tensors]


def weighted_whiten(
    values: Tensor, weights: Tensor, all_reduce: Callable[[Tensor], Tensor] = lambda sums: sums
) -> Tensor:
    """(value - mu) / sqrt(var + 1e-8), mu and var (n - 1) of values that count ``weights`` times.

    In float64, over all that ``all_reduce`` sums; 0 where the weight, which may be bool, is 0.
    """
    counts = weights > 0
    x = torch.where(counts, values.double(), 0.0)
    sums = torch.stack([weights.sum(dtype=torch.float64), (weights * x).sum()])
    count, total = all_reduce(sums).unbind()
    centred = torch.where(counts, x - total / count.clamp(min=1), 0.0)
    variance = all_reduce((weights * centred.square()).sum()) / (count - 1).clamp(min=1)
    return (centred * (variance + 1e-8).rsqrt()).to(values.dtype)


def check_shapes(function: str, dims: str, **tensors: Tensor) -> None:
    """All have one shape, of as many dimensions as ``dims`` names."""
    check_tensors(f"advantages.{function}", **tensors)
    shape = next(iter(tensors.values())).shape
    for name, tensor in tensors.items():
        if tensor.shape != shape or tensor.ndim != dims.count(",") + 1:
            expected = f"[{dims}], the same for {', '.join(tensors)}"
            raise fail(function, name, expected, list(tensor.shape), "Reshape or expand it.")


def check_rows(function: str, rows: int, **per_row: Tensor) -> None:
    check_tensors(f"advantages.{function}", **per_row)
    for name, tensor in per_row.items():
        if tensor.shape != (rows,):
            remedy = "One value per response."
            raise fail(function, name, f"[B], B = {rows}", list(tensor.shape), remedy)
