"""Weights with a memory: small modules whose buffers go into a checkpoint with ``state_dict``.

On several ranks give every one the same hook ``all_reduce``, a function that returns the sum of a
tensor over the ranks, such as ``fastpo.distributed.all_reduce_sum()``; all ranks then keep the same
state. Without a hook a module knows its own process only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.weights._common import Memory, accumulation, check_like, check_range, fail

AllReduce = Callable[[Tensor], Tensor]


class BatchBeta(NamedTuple):
    """What beta-DPO makes of a batch.

    Attributes:
        beta: 0-d, one for the batch.
        pair_weights: [B] 0 for a dropped pair; the others share the weight of all.
    """

    beta: Tensor
    pair_weights: Tensor


class BetaDPO(Memory):
    """beta-DPO's batch beta and its draw of pairs, for :func:`fastpo.losses.beta_dpo`.

    With d the difference of log-ratios of each pair (arXiv:2407.08639, the authors' code):

    1. M and s, running mean and standard deviation of d over batches, take in this batch.
    2. int(B (1 - drop_share)) pairs are drawn without replacement, with probabilities proportional
       to exp(-((d - M) / s)^2 / 2). With s = 0 (all alike) the draw is uniform.
    3. beta = max(beta_0 (1 + alpha (mean of d over the drawn - M)), 1e-3).

    The batch is that of all ranks and the draw is one for all; in the released code every rank
    draws its own. Kept pairs weigh B / kept, so that a mean over the B pairs of each rank, averaged
    over ranks, is the mean over the kept pairs of all. In evaluation mode nothing is dropped and
    M and s stand still.

    Args:
        beta: beta_0, > 0.
        alpha: how strongly beta follows the batch.
        drop_share: share of pairs that a batch loses, in [0, 1).
        momentum: of M and s, in [0, 1]; both start at 0.
        seed: of the draw, the same on every rank. The generator's state is part of the state dict.
        all_reduce: sum over ranks; None on a single one.
        rank: the place of this rank.
        world_size: number of ranks; all must have batches of one size.

    Defaults of alpha and drop_share are the paper's as we remember them, not read.

    Example:
        >>> batch = BetaDPO(beta=0.1, drop_share=0.5)(torch.tensor([0.2, 0.4, -0.1, 3.0]))
        >>> sorted(batch.pair_weights.tolist())
        [0.0, 0.0, 2.0, 2.0]
    """

    def __init__(
        self,
        beta: float = 0.1,
        alpha: float = 0.6,
        drop_share: float = 0.2,
        momentum: float = 0.9,
        seed: int = 0,
        all_reduce: AllReduce | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        super().__init__()
        if not 0 < beta < float("inf"):
            raise fail("BetaDPO", "beta", "a positive finite number", repr(beta), "Try 0.1.")
        if not math.isfinite(alpha):
            raise fail("BetaDPO", "alpha", "a finite number", repr(alpha), "0 keeps beta as it is.")
        check_range("BetaDPO", "momentum", momentum, 0, 1, "0 takes each batch alone.")
        if not 0 <= drop_share < 1:
            remedy = "0 keeps all pairs."
            raise fail("BetaDPO", "drop_share", "a number in [0, 1)", repr(drop_share), remedy)
        if (world_size > 1) != (all_reduce is not None) or not 0 <= rank < world_size:
            expected = "a hook and a place below world_size, or one rank without a hook"
            got = f"{all_reduce}, {rank} of {world_size}"
            raise fail("BetaDPO", "all_reduce, rank", expected, got, "Pass all three or none.")
        self.beta, self.alpha, self.drop_share, self.momentum = beta, alpha, drop_share, momentum
        self.rank, self.world_size, self._all_reduce = rank, world_size, all_reduce
        self.register_buffer("gap_mean", torch.zeros((), dtype=torch.float32))
        self.register_buffer("gap_std", torch.zeros((), dtype=torch.float32))
        self._generator = torch.Generator().manual_seed(seed)

    def get_extra_state(self) -> Tensor:
        """State of the generator."""
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Continue the draws of a checkpoint."""
        self._generator.set_state(state.cpu())

    def forward(self, margins: Tensor) -> BatchBeta:
        """The batch's beta and weights.

        Args:
            margins: [B] differences of log-ratios d, nats, of this rank's pairs.
        """
        margins_B = accumulation(margins)
        batch_B = self._gather(margins_B)
        total = batch_B.shape[0]
        kept_B = torch.ones_like(batch_B)
        count = total
        if self.training and total:
            self._update(batch_B)
            count = max(int(total * (1 - self.drop_share) + 1e-9), 1)
            kept_B = self._draw(batch_B, count)
        gap = (batch_B * kept_B).sum() / max(count, 1) - self.gap_mean
        beta = (self.beta * (1 + self.alpha * gap)).clamp(min=1e-3)
        own_B = kept_B.reshape(self.world_size, -1)[self.rank]
        return BatchBeta(beta, own_B * (total / max(count, 1)))

    def _gather(self, margins_B: Tensor) -> Tensor:
        if self._all_reduce is None:
            return margins_B
        table_RB = margins_B.new_zeros(self.world_size, margins_B.shape[0])
        table_RB[self.rank] = margins_B
        return self._all_reduce(table_RB).flatten()

    def _update(self, batch_B: Tensor) -> None:
        std = batch_B.std() if batch_B.shape[0] > 1 else torch.zeros_like(batch_B.sum())
        for buffer, value in ((self.gap_mean, batch_B.mean()), (self.gap_std, std)):
            buffer.lerp_(value.to(buffer), 1 - self.momentum)

    def _draw(self, batch_B: Tensor, count: int) -> Tensor:
        """Gumbel's trick: the largest of log-weight + noise are a draw without replacement.

        It works on logarithms, so that no weight is lost to underflow.
        """
        tiny = torch.finfo(self.gap_std.dtype).tiny
        distance_B = (batch_B - self.gap_mean) / self.gap_std.clamp(min=tiny)
        log_weights_B = torch.where(self.gap_std > 0, -0.5 * distance_B**2, 0.0)
        uniform_B = torch.rand(batch_B.shape, generator=self._generator, dtype=torch.float64)
        noise_B = -torch.log(-torch.log(uniform_B.clamp(min=torch.finfo(torch.float64).tiny)))
        keys_B = log_weights_B + noise_B.to(log_weights_B, non_blocking=True)
        return torch.zeros_like(batch_B).scatter(0, keys_B.topk(count).indices, 1.0)


class RePO(Memory):
    """RE-PO's reliabilities eta of annotators, for :func:`fastpo.losses.re_po`.

    After each batch eta_k <- (1 - rate) eta_k + rate * mean of q over the rows of annotator k, for
    the annotators that the batch has (arXiv:2509.24159, M-step as a running mean). With rate = 1
    and the whole data in one batch it is the exact M-step.

    Args:
        annotators: how many; 1 where they are not known.
        initial: eta at the start, in [0, 1].
        rate: of the running mean, the paper's alpha, in [0, 1].
        all_reduce: sum over ranks; None on a single one.

    Example:
        >>> reliabilities = RePO()
        >>> annotators = torch.zeros(2, dtype=torch.long)
        >>> reliabilities(annotators)
        tensor([0.9000, 0.9000])
        >>> reliabilities.update(torch.tensor([1.0, 0.8]), annotators)
        >>> reliabilities.eta
        tensor([0.9000])
    """

    def __init__(
        self,
        annotators: int = 1,
        initial: float = 0.9,
        rate: float = 0.1,
        all_reduce: AllReduce | None = None,
    ):
        super().__init__()
        check_range("RePO", "initial", initial, 0, 1, "1 takes every label as right.")
        check_range("RePO", "rate", rate, 0, 1, "0 leaves eta as it is.")
        self.rate, self._all_reduce = rate, all_reduce
        self.register_buffer("eta", torch.full((annotators,), initial, dtype=torch.float32))

    def forward(self, annotators: Tensor) -> Tensor:
        """Reliability of each row's annotator, [B]."""
        return self.eta[annotators]

    @torch.no_grad()
    def update(self, posteriors: Tensor, annotators: Tensor) -> None:
        """Take in a batch.

        Args:
            posteriors: [B] probabilities q that a row's label is right, the loss's metric
                ``posteriors``.
            annotators: [B] the number of each row's annotator.
        """
        check_like("RePO.update", "annotators", annotators, "posteriors", posteriors)
        # One-hot rows: an index_add would add in any order on a GPU, and autocast would take a
        # matrix product in bfloat16.
        classes_K = torch.arange(len(self.eta), device=annotators.device)
        rows_KB = (classes_K[:, None] == annotators).to(self.eta)
        sums_2K = torch.stack(((rows_KB * posteriors.to(self.eta)).sum(1), rows_KB.sum(1)))
        if self._all_reduce is not None:
            sums_2K = self._all_reduce(sums_2K)
        means_K = sums_2K[0] / sums_2K[1].clamp(min=1)
        self.eta.copy_(torch.where(sums_2K[1] > 0, self.eta.lerp(means_K, self.rate), self.eta))


class DynamicLabels(Memory):
    """One soft label per pair of the data set, which moves towards what the policy believes.

    l <- (1 - rate) l + rate sigmoid(d) after the pair's loss, from 1. Used by POWER-DL
    (arXiv:2412.09544) as the label of a logistic loss in d; once l = sigmoid(d) the pair has no
    gradient.

    A pair is found by its number in the data set, which must stay the same over epochs, whatever
    the order. Every rank updates its own pairs; ``share`` brings the ranks together, once an epoch
    and before a checkpoint. A pair seen by several ranks gets the mean of their changes.

    Args:
        count: number of pairs.
        rate: the paper's gamma, in [0, 1]; 0 leaves all labels alone.
        all_reduce: sum over ranks; None on a single one.

    Experimental: the schedule is derived, not read; the value of gamma is ours.

    Example:
        >>> labels, ids = DynamicLabels(1000), torch.tensor([7, 42])
        >>> labels(ids)
        tensor([1., 1.])
        >>> labels.update(ids, torch.tensor([0.05, 0.44]))
        tensor([0.9512, 0.9608])
    """

    def __init__(self, count: int, rate: float = 0.1, all_reduce: AllReduce | None = None):
        super().__init__()
        check_range("DynamicLabels", "rate", rate, 0, 1, "0 leaves the labels as they are.")
        self.rate, self._all_reduce = rate, all_reduce
        self.register_buffer("labels", torch.ones(count, dtype=torch.float32))
        self.register_buffer("shared", torch.ones(count, dtype=torch.float32))

    def forward(self, ids: Tensor) -> Tensor:
        """Labels [B] of the pairs with these numbers."""
        return self.labels[ids]

    @torch.no_grad()
    def update(self, ids: Tensor, margins: Tensor) -> Tensor:
        """Move the labels of a batch and return them.

        Args:
            ids: [B] numbers of the pairs, each one at most once.
            margins: [B] the argument d of the loss's sigmoid.
        """
        check_like("DynamicLabels.update", "margins", margins, "ids", ids)
        moved_B = self.labels[ids].lerp(
            torch.sigmoid(accumulation(margins)).to(self.labels), self.rate
        )
        self.labels[ids] = moved_B
        return moved_B

    @torch.no_grad()
    def share(self) -> None:
        """Give every rank the changes of all since the last call."""
        if self._all_reduce is not None:
            change = self.labels - self.shared
            changes, ranks = self._all_reduce(torch.stack((change, (change != 0).to(change))))
            self.labels.copy_(self.shared + changes / ranks.clamp(min=1))
        self.shared.copy_(self.labels)
