"""The two small records every kernel works on: a tile of logits and the running state of its rows.

Tensor names end in their dimensions (key in ``fastpo/__init__.py``); n and v are the rows and the
columns of one tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Rows of RowState.values_Sn, as in csrc/fastpo.h. Everything but the target logit and the sum of
# logits leaves the target column out, so that 1 - p(target) is never formed by a difference.
MAX, SUM_EXP, TARGET_LOGIT, SUM_EXP_LOGIT, SUM_SQ_EXP, SUM_LOGITS = range(6)

# Optional statistics, as bits of RowState.moments.
MOMENTS = {"entropy": 1, "log_sum_sq_probs": 2, "mean_logits": 4, "is_top1": 8}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type statistics are kept in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Tile(NamedTuple):
    """Columns ``vocab_start .. vocab_start + v`` of n rows of logits, and what turns them into z.

    ``z = softcap * tanh(scale * (logit + bias) / softcap) / temperature``; ``softcap = 0`` means
    none. Rows whose target is ``ignore_index`` are skipped.
    """

    logits_nv: torch.Tensor
    targets_n: torch.Tensor
    vocab_start: int = 0
    bias_v: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    temperature: float = 1.0
    ignore_index: int = -100


class RowState(NamedTuple):
    """Running statistics of n rows over the columns seen so far."""

    values_Sn: torch.Tensor
    top_n: torch.Tensor
    moments: int

    @classmethod
    def start(cls, n: int, dtype: torch.dtype, device: torch.device, moments: int) -> RowState:
        """The state before any column; a target that no column matches leaves NaN behind."""
        values_Sn = torch.zeros(6, n, dtype=dtype, device=device)
        values_Sn[MAX] = -torch.inf
        values_Sn[TARGET_LOGIT] = torch.nan
        top_n = torch.full((n,), torch.iinfo(torch.int32).max, dtype=torch.int32, device=device)
        return cls(values_Sn, top_n, moments)

    def rows(self, start: int, stop: int) -> RowState:
        """A view of rows ``start .. stop``."""
        return RowState(self.values_Sn[:, start:stop], self.top_n[start:stop], self.moments)
