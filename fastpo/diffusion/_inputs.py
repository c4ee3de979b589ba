"""Checks and shapes that errors and step log-probs share."""

from __future__ import annotations

from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from fastpo.checks import check_operands, fail
from fastpo.ops._check import check_float, check_shape

Reduction = Literal["mean", "sum"]


def check_reduction(op: str, reduction: str) -> None:
    """How elements become one number."""
    if reduction not in ("mean", "sum"):
        raise fail(op, "reduction", "mean or sum", repr(reduction), "Pick one of them.")


def check_fields(op: str, **fields: Tensor | None) -> None:
    """Floats [N, ...] of the first one's shape and device; all but the first may be None.

    Raises:
        ValueError: they do not fit.
    """
    (first, base), *others = fields.items()
    check_operands(op, dict(others), **{first: base})
    check_float(op, first, base)
    if base.ndim < 1:
        remedy = "Add a first dimension for the samples."
        raise fail(op, first, "samples [N, ...]", "a 0-d tensor", remedy)
    for name, field in others:
        if field is None:
            continue
        check_float(op, name, field)
        check_shape(op, name, field, tuple(base.shape), f"that of {first}")


def check_constant(op: str, **tensors: Tensor | None) -> None:
    """Tensors through which no gradient flows do not ask for one."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            remedy = "Pass it detached: no gradient flows there."
            raise fail(op, name, "a constant", "a tensor with requires_grad", remedy)


def placed(
    op: str, name: str, numbers: Tensor | float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A constant's numbers on the device, for which nothing waits as for a plain copy."""
    if isinstance(numbers, Tensor):
        check_constant(op, **{name: numbers})
        return numbers.to(device, dtype, non_blocking=True)
    if isinstance(numbers, bool) or not isinstance(numbers, Real):
        remedy = f"Pass torch.tensor({name.rpartition('.')[2]})."
        raise fail(op, name, "a number or a tensor", f"a {type(numbers).__name__}", remedy)
    return torch.full((), float(numbers), dtype=dtype, device=device)


def per_sample(
    op: str, name: str, numbers: Tensor | float | None, like: Tensor, acc: torch.dtype
) -> Tensor | None:
    """Numbers as acc [N]; None stays None."""
    if numbers is None:
        return None
    numbers = placed(op, name, numbers, acc, like.device)
    if numbers.ndim > 1 or (numbers.numel() != 1 and numbers.numel() != like.shape[0]):
        remedy = "Give one number per sample."
        raise fail(op, name, f"[{like.shape[0]}] or one number", f"{list(numbers.shape)}", remedy)
    return numbers.reshape(-1).expand(like.shape[0])


def like_prediction(op: str, name: str, tensor: Tensor, prediction: Tensor) -> Tensor:
    """A tensor of the prediction's dimensions, each of its size or 1, as a view of its shape."""
    sizes = zip(tensor.shape, prediction.shape, strict=False)
    if tensor.ndim != prediction.ndim or any(a not in (1, b) for a, b in sizes):
        expected = f"{list(prediction.shape)}, or 1 in some of these dimensions"
        remedy = "Put dimensions of size 1 where all elements share a value: [N, 1, H, W]."
        raise fail(op, name, expected, f"{list(tensor.shape)}", remedy)
    return tensor.expand_as(prediction)
