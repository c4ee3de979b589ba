"""Leave-one-out advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.advantages import _groups as shared
from fastpo.advantages._groups import Singleton
from fastpo.groups import Groups, group_affine
from fastpo.operands import replaced


def rloo(
    rewards: Tensor,
    groups: Groups | Tensor | int | None = None,
    *,
    kl: Tensor | None = None,
    beta: float = 0.05,
    reward_range: tuple[float, float] | None = None,
    normalize: bool = False,
    singleton: Singleton = "zero",
) -> Tensor:
    """Leave-one-out advantages: the reward minus the mean of the group's other rewards.

    A_i = R_i - mean_{j != i} R_j, R = clip(rewards) - beta kl  (arXiv:2402.14740, in the form of
    TRL's trainer). Responses whose reward is NaN are left out of every mean and have advantage 0.
    A group's advantages sum to 0.

    Args:
        rewards: [N] with ``groups``, or [P, G] without; NaN where a response could not be scored.
        groups: the size of every group, int ids [N], or :class:`fastpo.Groups`.
        kl: in the shape of ``rewards``, sums of log p - log ref over each response's tokens, under
            the policy that wrote it. Not the estimator that is never negative.
        beta: weight of ``kl``, >= 0.
        reward_range: lowest and highest reward; no clip if not given.
        normalize: subtract the mean and divide by the standard deviation (n - 1) plus 1e-4, over
            all responses of the batch that have a scorable sibling.
        singleton: the advantage of a group's only scorable response: ``zero``, as TRL and verl's
            vectorised form, or its ``reward``, as verl's loop.

    Returns:
        Float32, or float64 for float64 inputs, in the shape of ``rewards``. No gradient.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> rloo(torch.tensor([[1.0, float("nan"), 0.5, 0.2]]))
        tensor([[ 0.6500,  0.0000, -0.1000, -0.5500]])
    """
    shared.check_range("rloo", "beta", beta, 0, "0 leaves the KL out.")
    shared.check_choice("rloo", "singleton", singleton, shared.SINGLETONS)
    if reward_range is not None and not reward_range[0] <= reward_range[1]:
        raise shared.fail("rloo", "reward_range", "lowest, highest", reward_range, "Swap them.")
    rows = shared.rows_of("rloo", rewards, groups)
    if reward_range is not None:
        rows = replaced(rows, rewards=rows.rewards.clamp(*reward_range))
    if kl is not None:
        (kl_N,) = rows.per_row("rloo", kl=kl)
        rows = replaced(rows, rewards=rows.rewards.to(rows.dtype) - beta * kl_N)
    stats = rows.stats()
    others_G = (stats.count - 1).clamp(min=1)
    advantages = rows.affine(shared.baseline(stats, singleton), stats.count / others_G)
    return _normalize(advantages, rows, stats.count) if normalize else advantages


def _normalize(advantages: Tensor, rows: shared.Rows, counts_G: Tensor) -> Tensor:
    """Over the batch, leaving out responses that are not scored or have no scored sibling."""
    has_sibling_G = (counts_G > 1).to(advantages.dtype)
    ones_N = rows.rewards * 0 + 1  # NaN stays NaN, which group_affine makes 0
    valid_N = group_affine(ones_N, rows.groups, torch.zeros_like(has_sibling_G), has_sibling_G)
    valid = valid_N.reshape(rows.shape)
    count = valid.sum()
    centred = (advantages - (valid * advantages).sum() / count.clamp(min=1)) * valid
    std = (centred.square().sum() / (count - 1).clamp(min=1)).sqrt()
    return centred * shared.reciprocal(std, 1e-4)
