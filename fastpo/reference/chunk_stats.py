"""Reference of ``chunk_stats``: fold one tile of logits into the running row state."""

from __future__ import annotations

import torch

from fastpo.reference._transform import active, is_target, scaled_logits
from fastpo.tiles import (
    MAX,
    MOMENTS,
    SUM_EXP,
    SUM_EXP_LOGIT,
    SUM_LOGITS,
    SUM_SQ_EXP,
    TARGET_LOGIT,
    RowState,
    Tile,
)


def fold(tile: Tile, state: RowState) -> tuple[torch.Tensor, torch.Tensor]:
    """Update ``state``; return exp(z - max) [n, v], 0 at the target, and exp(old - new max) [n]."""
    z_nv, _ = scaled_logits(tile)
    at_target_nv, active_n = is_target(tile), active(tile)
    rest_nv = z_nv.masked_fill(at_target_nv, -torch.inf)
    old_n, sum_n, _, sum_exp_logit_n, sum_sq_n, _ = state.values_Sn.clone()

    row_max_n = rest_nv.amax(dim=1)
    new_n = torch.maximum(old_n, row_max_n)
    shift_n = torch.where(new_n == -torch.inf, 0.0, new_n)  # -inf - -inf would be NaN
    exp_nv = torch.exp(rest_nv - shift_n[:, None])
    rescale_n = torch.exp(old_n - shift_n)
    above_nv = torch.where(exp_nv == 0, 0.0, rest_nv - shift_n[:, None])
    drop_n = torch.where(rescale_n == 0, 0.0, old_n - shift_n)

    hit_n = at_target_nv.any(dim=1)
    target_n = torch.where(at_target_nv, z_nv, 0.0).sum(dim=1)
    top_n = torch.where(rest_nv == row_max_n[:, None], 1, 0).argmax(dim=1) + tile.vocab_start

    def write(row: int, value_n: torch.Tensor, where_n: torch.Tensor = active_n) -> None:
        state.values_Sn[row] = torch.where(where_n, value_n, state.values_Sn[row])

    if state.moments & MOMENTS["is_top1"]:
        moved_n = active_n & (row_max_n > old_n)
        state.top_n.copy_(torch.where(moved_n, top_n, state.top_n).to(torch.int32))
    write(MAX, new_n)
    write(SUM_EXP, rescale_n * sum_n + exp_nv.sum(dim=1))
    write(TARGET_LOGIT, target_n, active_n & hit_n)
    if state.moments & MOMENTS["entropy"]:
        moved_sum_n = rescale_n * (sum_exp_logit_n + drop_n * sum_n)
        write(SUM_EXP_LOGIT, moved_sum_n + (exp_nv * above_nv).sum(dim=1))
    if state.moments & MOMENTS["log_sum_sq_probs"]:
        write(SUM_SQ_EXP, rescale_n**2 * sum_sq_n + (exp_nv**2).sum(dim=1))
    if state.moments & MOMENTS["mean_logits"]:
        write(SUM_LOGITS, state.values_Sn[SUM_LOGITS] + z_nv.sum(dim=1))
    return exp_nv, rescale_n


def chunk_stats(tile: Tile, state: RowState) -> None:
    """Fold ``tile`` into ``state``, in place."""
    fold(tile, state)
