"""Rows times one factor each, the whole backward of a frozen head."""

from __future__ import annotations

import torch

from fastpo import backends
from fastpo.ops._library import Gradient, register

# Rows that are scaled at a time where the result is of another type.
_BLOCK_ROWS = 4096


def _scale_rows(input: torch.Tensor, factors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out_NH = torch.empty(input.shape, dtype=dtype, device=input.device)
    if input.numel() == 0:
        return out_NH
    kernels = backends.kernels(input.device)
    if dtype == input.dtype:
        kernels.scale_rows(input, factors, out_NH)
        return out_NH
    scaled_nH = torch.empty_like(input[:_BLOCK_ROWS])
    for start in range(0, input.shape[0], _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        n = input[rows].shape[0]
        kernels.scale_rows(input[rows], factors[rows], scaled_nH[:n])
        out_NH[rows] = scaled_nH[:n]
    return out_NH


def _setup_context(ctx, inputs, outputs) -> None:
    input, factors, _ = inputs
    ctx.save_for_backward(input, factors)


def _backward(ctx, grad):
    input, factors = ctx.saved_tensors
    wide = grad.to(input.dtype)
    needs_input, needs_factors = ctx.needs_input_grad[:2]
    grad_input = wide * factors[:, None] if needs_input else None
    return grad_input, (wide * input).sum(1) if needs_factors else None, None


scale_rows = register(
    "scale_rows(Tensor input, Tensor factors, ScalarType dtype) -> Tensor",
    _scale_rows,
    lambda input, factors, dtype: torch.empty(input.shape, dtype=dtype, device=input.device),
    Gradient(_setup_context, _backward, differentiable=True),
)
