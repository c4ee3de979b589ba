"""Advantages of the steps of agents: of the episode, and of the step among its equals."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastpo.advantages import _groups as shared
from fastpo.advantages._groups import Singleton
from fastpo.checks import check_tensors
from fastpo.groups import Groups, group_affine, group_stats


def _nested(groups: Groups, inner: Groups) -> Groups:
    """Rows that share the group and the inner group."""
    return Groups.from_ids(groups.index * (inner.count + 1) + inner.index)


def gigpo(
    rewards: Tensor,
    groups: Groups | Tensor | int,
    *,
    trajectories: Groups | Tensor,
    anchors: Groups | Tensor,
    step_returns: Tensor,
    step_weight: float = 1.0,
    scale: Literal["none", "group"] = "none",
    counted: Literal["trajectories", "steps"] = "trajectories",
    eps: float = 1e-6,
    singleton: Singleton = "reward",
) -> Tensor:
    """GiGPO advantages: of the episode in its group, plus of the step among those of one state.

    A = A_E + w A_S, A_E = R - mean R of the group, A_S = q - mean q of the group's steps with the
    same anchor; with ``scale="group"`` both are divided by the same set's standard deviation + eps
    (arXiv:2505.10978). A step alone with its anchor has A_S = 0.

    The paper's mean R counts each trajectory once, as the first author's later code does. The code
    released with the paper counts, unless told otherwise, every step, so that a long trajectory
    weighs more: ``counted="steps"``.

    Args:
        rewards: [N] rewards R of the episode each step belongs to, one row per step; NaN where
            there is none.
        groups: int ids [N] of the task that a step's trajectory tries, a size, or
            :class:`fastpo.Groups`.
        trajectories: int ids [N], unique over the batch, or :class:`fastpo.Groups`.
        anchors: int ids [N], such as a hash, of the observation each step starts from, or
            :class:`fastpo.Groups`. They are compared inside a group alone.
        step_returns: [N] discounted returns q, as ``fastpo.advantages.step_returns`` computes.
        step_weight: w.
        scale: ``none`` or ``group``.
        counted: what the statistics of R are over: ``trajectories`` or ``steps``.
        eps: >= 0.
        singleton: A_E in a group of one trajectory: its ``reward``, or ``zero``.

    Returns:
        [N] float32, or float64 for float64 inputs. No gradient.

    Raises:
        ValueError: shapes do not fit or an option is none of the above.

    Example:
        >>> gigpo(torch.tensor([1.0, 1.0, 0.0]), 3, trajectories=torch.tensor([0, 0, 1]),
        ...       anchors=torch.tensor([5, 7, 5]), step_returns=torch.tensor([0.9, 1.0, 0.0]))
        tensor([ 0.9500,  0.5000, -0.9500])
    """
    check_tensors(
        "advantages.gigpo",
    )
    shared.check_choice("gigpo", "scale", scale, ("none", "group"))
    shared.check_choice("gigpo", "counted", counted, ("trajectories", "steps"))
    shared.check_choice("gigpo", "singleton", singleton, shared.SINGLETONS)
    shared.check_range("gigpo", "eps", eps, 0, "1e-6 is the authors'.")
    if groups is None:
        raise shared.fail("gigpo", "groups", "a size, ids or Groups", None, "Rows are steps.")
    rows = shared.rows_of("gigpo", rewards, groups)
    (returns_N,) = rows.per_row("gigpo", step_returns=step_returns)
    count, device = rows.groups.rows, rewards.device
    trajectories = Groups.of(trajectories, count, device)
    steps = _nested(rows.groups, Groups.of(anchors, count, device))

    def centred(values_N: Tensor, groups: Groups, stats, singleton: Singleton) -> Tensor:
        scale_G = torch.ones_like(stats.mean)
        if scale == "group":
            scale_G = shared.reciprocal(shared.group_std(stats, singleton, 1), eps)
        return group_affine(values_N, groups, shared.baseline(stats, singleton), scale_G)

    counted_N = rows.rewards
    if counted == "trajectories":
        # Of equal values the first row is the largest: one row of each trajectory is counted.
        first_M = group_stats(torch.zeros_like(returns_N), trajectories).arg_max
        counted_N = counted_N.masked_fill(~shared.marked_rows(first_M, count), torch.nan)
    episodes = group_stats(counted_N, rows.groups)
    episode_N = centred(rows.rewards, rows.groups, episodes, singleton)
    step_N = centred(returns_N, steps, group_stats(returns_N, steps), "zero")
    return episode_N + step_weight * step_N
