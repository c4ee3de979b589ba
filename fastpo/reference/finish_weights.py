"""Reference of ``finish_weights``: accumulated products to d log-prob / d hidden."""

from __future__ import annotations

import torch

from fastpo.tiles import MAX, SUM_EXP, TARGET_LOGIT, RowState


def finish_weights(
    state: RowState,
    partial_nH: torch.Tensor,
    target_rows_nH: torch.Tensor,
    unit_grad_NH: torch.Tensor,
    targets_n: torch.Tensor,
    *,
    ignore_index: int = -100,
    rows: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> None:
    """``(scale / temperature) (1 - p_y) (cap'_y W_y - partial / sum_exp)``, written at ``rows``."""
    max_n, sum_n, target_n = (state.values_Sn[row] for row in (MAX, SUM_EXP, TARGET_LOGIT))
    margin_n = torch.where(target_n == torch.inf, torch.nan, target_n - max_n - torch.log(sum_n))
    other_n = torch.sigmoid(-margin_n)
    cap_grad_n = torch.ones_like(target_n)
    if softcap != 0.0:
        cap_grad_n = 1 - (target_n * temperature / softcap) ** 2
    mean_nH = partial_nH / torch.where(sum_n == 0, 1.0, sum_n)[:, None]
    unit_nH = cap_grad_n[:, None] * target_rows_nH.to(partial_nH.dtype) - mean_nH
    unit_nH = scale / temperature * other_n[:, None] * unit_nH
    unit_nH = torch.where((targets_n == ignore_index)[:, None], 0.0, unit_nH)
    unit_grad_NH[slice(None) if rows is None else rows] = unit_nH.to(unit_grad_NH.dtype)
