"""Reference of ``chunk_weights``: fold a tile and form its weights for the frozen-head product."""

from __future__ import annotations

import torch

from fastpo.reference._transform import active, scaled_logits
from fastpo.reference.chunk_stats import fold
from fastpo.tiles import RowState, Tile


def chunk_weights(
    tile: Tile,
    state: RowState,
    weights_nv: torch.Tensor,
    partial_nH: torch.Tensor | None,
) -> None:
    """``weights = exp(z - max) * cap'``, 0 at the target; ``partial`` goes to the new maximum."""
    cap_grad_nv = scaled_logits(tile)[1]
    exp_nv, rescale_n = fold(tile, state)
    active_n = active(tile)
    weights_nv.copy_(torch.where(active_n[:, None], exp_nv * cap_grad_nv, 0.0))
    if partial_nH is not None:
        partial_nH.mul_(torch.where(active_n, rescale_n, 1.0)[:, None])
