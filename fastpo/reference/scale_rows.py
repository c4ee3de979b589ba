"""Reference of ``scale_rows``: rows times one factor each."""

from __future__ import annotations

import torch


def scale_rows(input_NH: torch.Tensor, factors_N: torch.Tensor, out_NH: torch.Tensor) -> None:
    """``out = factors * input``, formed in the factors' dtype; a zero factor gives zeros."""
    scaled_NH = factors_N[:, None] * input_NH.to(factors_N.dtype)
    out_NH.copy_(torch.where(factors_N[:, None] == 0, 0.0, scaled_NH))
