"""Rows times one factor each, the whole backward of a frozen head."""

from __future__ import annotations

import torch

from fastpo import backends
from fastpo.ops._library import register


def _scale_rows(input_NH: torch.Tensor, factors_N: torch.Tensor) -> torch.Tensor:
    out_NH = torch.empty_like(input_NH)
    if input_NH.numel():
        backends.kernels(input_NH.device).scale_rows(input_NH, factors_N, out_NH)
    return out_NH


scale_rows = register(
    "scale_rows(Tensor input, Tensor factors) -> Tensor",
    _scale_rows,
    lambda input, factors: torch.empty_like(input),
)
