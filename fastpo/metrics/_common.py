"""What the metrics share: errors and inputs of one shape and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.checks import check_tensors


def fail(function: str, argument: str, expected: str, got: str, remedy: str) -> ValueError:
    name = f"fastpo.metrics.{function}: {argument}"
    return ValueError(f"{name}: expected {expected}, got {got}. {remedy}")


def prepare(function: str, **tensors: Tensor) -> list[Tensor]:
    """One shape, detached, in one dtype of at least float32."""
    check_tensors(f"metrics.{function}", **tensors)
    first = next(iter(tensors))
    dtype = torch.float32
    for name, tensor in tensors.items():
        if tensor.shape != tensors[first].shape:
            expected = f"{list(tensors[first].shape)} as {first}"
            remedy = "Give one value per sequence in every argument."
            raise fail(function, name, expected, f"{list(tensor.shape)}", remedy)
        if tensor.is_floating_point():
            dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.detach().to(dtype) for tensor in tensors.values()]
