"""State that a loss carries from batch to batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fastpo.losses._common import check_choice
from fastpo.weights._common import Memory


class BCODelta(Memory):
    """Running mean of the rewards of all responses seen: the shift of :func:`bco`.

    In training mode a call takes the batch in and then gives the mean; in evaluation mode it gives
    the mean alone, 0 before any training. Register it in the model or save its ``state_dict``: a
    run that goes on from a checkpoint needs it. Mean and count are kept in float64 and int64.

    Args:
        convention: ``rows``, the mean over all responses (TRL), or ``batch_means``, the mean of the
            batches' means, one per rank, which gives a short last batch a full share
            (LLaMA-Factory).
        all_reduce: sums a tensor over ranks and returns it, for example
            ``fastpo.distributed.all_reduce_sum()``; without it every rank has a mean of its own.

    Example:
        >>> delta = BCODelta()
        >>> delta(torch.tensor([0.25, -0.75]))
        tensor(-0.2500)
        >>> delta(torch.tensor([2.0]))
        tensor(0.5000)
        >>> delta.eval()(torch.tensor([100.0]))
        tensor(0.5000)
    """

    def __init__(
        self,
        convention: Literal["rows", "batch_means"] = "rows",
        all_reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        check_choice("BCODelta", "convention", convention, ("rows", "batch_means"))
        super().__init__()
        self.convention = convention
        self.all_reduce = all_reduce
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, rewards: Tensor) -> Tensor:
        """The shift for a batch of rewards beta (policy - ref), any shape; 0-d, in their dtype."""
        if self.training:
            self._update(rewards.detach().double())
        return self.mean.to(torch.promote_types(rewards.dtype, torch.float32), copy=True)

    def _update(self, rewards: Tensor) -> None:
        total, count = rewards.sum(), rewards.new_full((), rewards.numel())
        if self.convention == "batch_means":
            # A rank with an empty batch has no mean to add.
            total, count = total / count.clamp(min=1), count.clamp(max=1)
        sums = torch.stack((total, count))
        if self.all_reduce is not None:
            sums = self.all_reduce(sums)
        total, count = sums
        self.count += count.to(torch.int64)
        self.mean += (total - count * self.mean) / self.count.clamp(min=1)
