"""Reference of ``chunk_grad``: one tile of logits to the gradient of the loss by the raw logits."""

from __future__ import annotations

import torch

from fastpo.reference._transform import active, is_target, scaled_logits
from fastpo.tiles import Tile


def chunk_grad(
    tile: Tile,
    out_nv: torch.Tensor,
    *,
    logprobs: torch.Tensor,
    lse: torch.Tensor,
    lse_low: torch.Tensor,
    entropy: torch.Tensor | None = None,
    grad_logprobs: torch.Tensor | None = None,
    grad_entropy: torch.Tensor | None = None,
    grad_lse: torch.Tensor | None = None,
) -> None:
    """``dz_v = g (1[v=y] - p_v) - h p_v (log p_v + H) + k p_v``, chained to the raw logits."""
    z_nv, cap_grad_nv = scaled_logits(tile)
    at_target_nv = is_target(tile)
    log_p_nv = (z_nv - lse[:, None]) - lse_low[:, None]
    log_p_nv = torch.where(at_target_nv, logprobs[:, None], log_p_nv)
    p_nv = torch.exp(log_p_nv)
    grad_nv = torch.zeros_like(z_nv)
    if grad_logprobs is not None:
        one_minus_p_n = -torch.expm1(logprobs)
        unit_nv = torch.where(at_target_nv, one_minus_p_n[:, None], -p_nv)
        grad_nv += grad_logprobs[:, None] * unit_nv
    if grad_entropy is not None:
        unit_nv = torch.where(p_nv == 0, 0.0, p_nv * (log_p_nv + entropy[:, None]))
        grad_nv -= grad_entropy[:, None] * unit_nv
    if grad_lse is not None:
        grad_nv += grad_lse[:, None] * p_nv
    grad_nv *= cap_grad_nv * (tile.scale / tile.temperature)
    out_nv.copy_(torch.where(active(tile)[:, None], grad_nv, 0.0))
