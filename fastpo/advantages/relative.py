"""Rewards relative to their group's mean."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastpo.advantages import _groups as shared
from fastpo.advantages._groups import Singleton
from fastpo.groups import Groups
from fastpo.operands import replaced


class _Convention(NamedTuple):
    eps: float
    singleton: Singleton
    variance_floor: float


CONVENTIONS = {
    "trl": _Convention(1e-4, "zero", 0.0),
    "verl": _Convention(1e-6, "reward", 0.0),
    "verl_vectorized": _Convention(1e-6, "reward", 1e-6),
}
SCALES = ("group", "batch", "none")


def grpo(
    rewards: Tensor,
    groups: Groups | Tensor | int | None = None,
    *,
    scale: Literal["group", "batch", "none"] = "group",
    convention: Literal["trl", "verl", "verl_vectorized"] = "trl",
    eps: float | None = None,
    ddof: int = 1,
    singleton: Singleton | None = None,
) -> Tensor:
    """GRPO advantages: rewards centred in their group and divided by a standard deviation.

    A_i = (r_i - mean_g) / (std_g + eps)  (arXiv:2402.03300, as TRL and verl compute it). A reward
    of NaN is left out of the statistics and has advantage 0; so have all of a group of equals.

    Args:
        rewards: [N] with ``groups``, or [P, G] without: each row a group.
        groups: the size of every group, int ids [N], or :class:`fastpo.Groups`.
        scale: ``group``; ``batch`` divides by the standard deviation of all rewards, means stay
            those of the groups; ``none`` divides by nothing.
        convention: which code's details. ``trl``: eps 1e-4, a group of one has advantage 0.
            ``verl``: eps 1e-6, a group of one has mean 0 and standard deviation 1.
            ``verl_vectorized``: so too, and variances of groups are at least 1e-6.
        eps: >= 0, instead of the convention's.
        ddof: 0 or 1, standard deviations divide by n - ddof.
        singleton: ``zero`` or ``reward`` for groups of one, instead of the convention's.

    Returns:
        Float32, or float64 for float64 rewards, in the shape of ``rewards``. No gradient.

    Raises:
        ValueError: shapes do not fit or an option is none of the above.

    Example:
        >>> grpo(torch.tensor([[1.0, 0.0, 0.5, 1.0], [0.3, 0.3, 0.3, 0.3]]))
        tensor([[ 0.7832, -1.3053, -0.2611,  0.7832],
                [ 0.0000,  0.0000,  0.0000,  0.0000]])
        >>> grpo(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0, 0, 1]), scale="none")
        tensor([ 0.5000, -0.5000,  0.0000])
    """
    shared.check_choice("grpo", "scale", scale, SCALES)
    shared.check_choice("grpo", "convention", convention, CONVENTIONS)
    default_eps, default_singleton, floor = CONVENTIONS[convention]
    eps = default_eps if eps is None else eps
    singleton = default_singleton if singleton is None else singleton
    shared.check_range("grpo", "eps", eps, 0, "1e-4 is TRL's, 1e-6 is verl's.")
    shared.check_choice("grpo", "singleton", singleton, shared.SINGLETONS)
    shared.check_choice("grpo", "ddof", ddof, (0, 1))
    rows = shared.rows_of("grpo", rewards, groups)
    stats = rows.stats()
    if scale == "group":
        std_G = shared.group_std(stats, singleton, ddof, floor)
        scale_G = shared.reciprocal(std_G, eps)
    elif scale == "batch":
        scale_G = shared.reciprocal(shared.batch_std(stats, ddof), eps).expand_as(stats.mean)
    else:
        scale_G = torch.ones_like(stats.mean)
    return rows.affine(shared.baseline(stats, singleton), scale_G)


def dr_grpo(
    rewards: Tensor,
    groups: Groups | Tensor | int | None = None,
    *,
    singleton: Singleton = "zero",
) -> Tensor:
    """Dr. GRPO advantages: rewards centred in their group, not scaled.

    A_i = r_i - mean_g  (arXiv:2503.20783).

    Args:
        rewards: [N] with ``groups``, or [P, G] without; NaN where there is none.
        groups: as in :func:`grpo`.
        singleton: the advantage of a group of one: ``zero``, as TRL, or its ``reward``, as verl.

    Returns:
        In the shape of ``rewards``, as of :func:`grpo`.

    Raises:
        ValueError: shapes do not fit or an option is none of the above.

    Example:
        >>> dr_grpo(torch.tensor([[1.0, 0.0, 0.5, 1.0]]))
        tensor([[ 0.3750, -0.6250, -0.1250,  0.3750]])
    """
    shared.check_choice("dr_grpo", "singleton", singleton, shared.SINGLETONS)
    rows = shared.rows_of("dr_grpo", rewards, groups)
    stats = rows.stats()
    return rows.affine(shared.baseline(stats, singleton), torch.ones_like(stats.mean))


def gpg(
    rewards: Tensor,
    groups: Groups | Tensor | int | None = None,
    *,
    f_norm: float = 1.0,
    singleton: Singleton = "reward",
) -> Tensor:
    """GPG advantages: centred rewards, scaled up by the share of rewards that are not 0.

    A_i = alpha (r_i - mean_g) / f_norm, alpha = N / max(1, number of r != 0)  (arXiv:2504.02546,
    as verl computes it), over all rewards of the batch that are not NaN.

    Args:
        rewards: [N] with ``groups``, or [P, G] without; NaN where there is none.
        groups: as in :func:`grpo`.
        f_norm: > 0.
        singleton: the baseline of a group of one is 0 with ``reward``, the reward with ``zero``.

    Returns:
        In the shape of ``rewards``, as of :func:`grpo`.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> gpg(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        tensor([[ 2., -2.],
                [ 0.,  0.]])
    """
    shared.check_choice("gpg", "singleton", singleton, shared.SINGLETONS)
    if not 0 < f_norm < float("inf"):
        raise shared.fail("gpg", "f_norm", "a finite number > 0", f_norm, "1 is verl's.")
    rows = shared.rows_of("gpg", rewards, groups)
    stats = rows.stats()
    nonzero = (rows.rewards.abs() > 0).sum()  # false for NaN
    scale = stats.count.sum() / nonzero.clamp(min=1) / f_norm
    return rows.affine(shared.baseline(stats, singleton), scale.expand_as(stats.mean))


def opo(
    rewards: Tensor,
    groups: Groups | Tensor | int | None = None,
    *,
    lengths: Tensor,
    singleton: Singleton = "reward",
) -> Tensor:
    """OPO advantages: the baseline is the mean weighted by the length of the responses.

    A_i = r_i - sum_j len_j r_j / sum_j len_j  (arXiv:2505.23585, as verl computes it).

    Args:
        rewards: [N] with ``groups``, or [P, G] without; NaN where there is none.
        groups: as in :func:`grpo`.
        lengths: tokens of each response, in the shape of ``rewards``. A group without a token has
            the plain mean.
        singleton: the baseline of a group of one is 0 with ``reward``, the reward with ``zero``.

    Returns:
        In the shape of ``rewards``, as of :func:`grpo`.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> opo(torch.tensor([[1.0, 0.0]]), lengths=torch.tensor([[3, 1]]))
        tensor([[ 0.2500, -0.7500]])
    """
    shared.check_choice("opo", "singleton", singleton, shared.SINGLETONS)
    rows = shared.rows_of("opo", rewards, groups)
    (lengths_N,) = rows.per_row("opo", lengths=lengths)
    stats = rows.stats(lengths_N)
    mean_G = torch.where(stats.weight > 0, stats.weighted_mean, stats.mean)
    base_G = shared.baseline(replaced(stats, mean=mean_G), singleton)
    return rows.affine(base_G, torch.ones_like(base_G))
