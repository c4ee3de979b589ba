"""Several rewards per response: their sum, normalised, or the sum of what is normalised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from fastpo.advantages import _groups as shared
from fastpo.advantages._common import weighted_whiten
from fastpo.advantages._groups import Singleton
from fastpo.advantages.relative import grpo
from fastpo.checks import check_tensors
from fastpo.groups import Groups, group_affine, group_stats
from fastpo.inputs import When
from fastpo.tiles import accumulation_dtype

_GDPO_EPS = {"trl": 1e-4, "nvlabs": 1e-4, "verl": 1e-6}


def _weights(
    function: str, rewards: Tensor, reward_weights: Tensor | Sequence[float] | None
) -> Tensor:
    """[K] in the result's type; 1 if not given."""
    components, dtype = rewards.shape[-1], accumulation_dtype(rewards.dtype)
    if reward_weights is None:
        return torch.ones(components, dtype=dtype, device=rewards.device)
    given_K = torch.as_tensor(reward_weights).detach()
    weights_K = given_K.to(rewards.device, dtype, non_blocking=True)  # a list must not wait
    if weights_K.shape != (components,):
        got = list(weights_K.shape)
        remedy = "One weight per component, in the last dimension."
        raise shared.fail(function, "reward_weights", f"[K], K = {components}", got, remedy)
    # Of a list or on the CPU, where looking at them does not wait for a device.
    if given_K.device.type == "cpu" and not given_K.isfinite().all():
        got, remedy = f"{given_K.tolist()}", "0 leaves a component out."
        raise shared.fail(function, "reward_weights", "finite numbers", got, remedy)
    return weights_K


def sum_rewards(rewards: Tensor, reward_weights: Tensor | Sequence[float] | None = None) -> Tensor:
    """Weighted sum of the components of a reward, NaN counting as 0; NaN where all are NaN.

    sum_k w_k r_k  (as TRL's sum_then_normalize has it).

    Args:
        rewards: [..., K].
        reward_weights: [K]; 1 if not given.

    Returns:
        [...] float32, or float64 for float64 rewards. No gradient.

    Raises:
        ValueError: the number of weights does not fit.

    Example:
        >>> sum_rewards(torch.tensor([[1.0, 0.5], [1.0, torch.nan]]), [1.0, 2.0])
        tensor([2., 1.])
    """
    check_tensors("advantages.sum_rewards", rewards=rewards)
    if not rewards.ndim or not rewards.is_floating_point():
        got = f"{rewards.dtype} {list(rewards.shape)}"
        raise shared.fail("sum_rewards", "rewards", "floats [..., K]", got, "Stack components.")
    weights_K = _weights("sum_rewards", rewards, reward_weights)
    rewards = rewards.detach()
    total = (rewards * weights_K).nansum(-1)
    return total.masked_fill(rewards.isnan().all(-1), torch.nan)


def weighted_sum_grpo(
    rewards: Tensor,
    groups: Groups | Tensor | int | None = None,
    *,
    reward_weights: Tensor | Sequence[float] | None = None,
    scale: Literal["group", "batch", "none"] = "group",
    convention: Literal["trl", "verl", "verl_vectorized"] = "trl",
    eps: float | None = None,
    ddof: int = 1,
    singleton: Singleton | None = None,
) -> Tensor:
    """GRPO advantages of the weighted sum of several rewards.

    grpo(sum_k w_k r_k), the multi-objective GRPO of arXiv:2503.21819. :func:`mo_grpo`, of another
    paper, normalises before it sums.

    Args:
        rewards: [N, K] with ``groups``, or [P, G, K] without; NaN where there is none.
        groups: the size of every group, int ids [N], or :class:`fastpo.Groups`.
        reward_weights: [K]; 1 if not given.
        scale: as of :func:`grpo`, as the options below.
        convention: see there.
        eps: see there.
        ddof: see there.
        singleton: see there.

    Returns:
        [N] or [P, G] float32, or float64 for float64 rewards. No gradient.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> rewards = torch.tensor([[1.0, 0.5], [0.0, 0.5]])
        >>> weighted_sum_grpo(rewards, 2, reward_weights=[1.0, 3.0])
        tensor([ 0.7070, -0.7070])
    """
    shared.check_rewards("weighted_sum_grpo", rewards, groups, components=True)
    total = sum_rewards(rewards, _weights("weighted_sum_grpo", rewards, reward_weights))
    return grpo(
        total, groups, scale=scale, convention=convention, eps=eps, ddof=ddof, singleton=singleton
    )


def _sum_of_normalised(
    rewards_NK: Tensor, groups: Groups, weights_K: Tensor, eps: float, singleton: Singleton
) -> Tensor:
    """[N] sum_k w_k (r_k - mean_gk) / (std_gk + eps) over the group; a NaN adds 0."""
    stats = group_stats(rewards_NK, groups)
    scale_GK = weights_K * shared.reciprocal(shared.group_std(stats, singleton, 1), eps)
    return group_affine(rewards_NK, groups, shared.baseline(stats, singleton), scale_GK)


def mo_grpo(
    rewards: Tensor,
    groups: Groups | Tensor | int | None = None,
    *,
    reward_weights: Tensor | Sequence[float] | None = None,
    eps: float = 1e-4,
) -> Tensor:
    """MO-GRPO advantages: each reward normalised in its group, then their sum.

    A_i = sum_k w_k (r_ik - mean_gk) / (std_gk + eps)  (arXiv:2509.22047). No reward outweighs the
    others by its scale. :func:`weighted_sum_grpo` sums before it normalises; :func:`gdpo`
    normalises the sum over the batch once more.

    Args:
        rewards: [N, K] with ``groups``, or [P, G, K] without; NaN, where there is none, adds 0.
        groups: the size of every group, int ids [N], or :class:`fastpo.Groups`.
        reward_weights: [K]; 1 if not given, as in the paper.
        eps: >= 0.

    Returns:
        [N] or [P, G] float32, or float64 for float64 rewards. No gradient.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> mo_grpo(torch.tensor([[1.0, 0.0], [0.0, 100.0], [1.0, 50.0], [0.0, 0.0]]), 4)
        tensor([ 0.0825,  0.4397,  1.1270, -1.6492])
    """
    shared.check_range("mo_grpo", "eps", eps, 0, "1e-4 is that of GRPO in TRL.")
    rows = shared.rows_of("mo_grpo", rewards, groups, components=True)
    weights_K = _weights("mo_grpo", rewards, reward_weights)
    sums_N = _sum_of_normalised(rows.rewards, rows.groups, weights_K, eps, "zero")
    return sums_N.reshape(rows.shape)


def gdpo(
    rewards: Tensor,
    groups: Groups | Tensor | int | None = None,
    *,
    reward_weights: Tensor | Sequence[float] | None = None,
    convention: Literal["trl", "nvlabs", "verl"] = "trl",
    lengths: Annotated[Tensor | None, When(convention="verl")] = None,
    eps: float | None = None,
) -> Tensor:
    """GDPO advantages: each reward normalised in its group, then their sum over the batch.

    p_i = sum_k w_k (r_ik - mean_gk) / (std_gk + eps), A_i = (p_i - mean p) / (std p + eps)
    (arXiv:2601.05242; ``normalize_then_sum`` of TRL).

    Args:
        rewards: [N, K] with ``groups``, or [P, G, K] without; NaN where there is none.
        groups: the size of every group, int ids [N], or :class:`fastpo.Groups`.
        reward_weights: [K]; 1 if not given.
        convention: which code's details. ``trl``: NaN is left out of the statistics. ``nvlabs``:
            NaN counts as 0, and one component alone is not normalised over the batch. ``verl``:
            NaN is left out, a group of one has mean 0 and standard deviation 1, and the batch is
            whitened over its tokens: (p - mu) / sqrt(var + 1e-8), each row as often as it has
            tokens. That code has two components and no weights.
        lengths: for ``verl``: tokens of each response, [N] or [P, G].
        eps: >= 0, instead of 1e-4, or 1e-6 of ``verl``.

    Returns:
        [N] or [P, G] float32, or float64 for float64 rewards; 0 where all components are NaN. No
        gradient.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> gdpo(torch.tensor([[[1.0, 0.2], [0.0, 0.2], [1.0, 0.8], [0.0, 0.2]]]))
        tensor([[ 0.2061, -0.7691,  1.3320, -0.7691]])
    """
    shared.check_choice("gdpo", "convention", convention, _GDPO_EPS)
    eps = _GDPO_EPS[convention] if eps is None else eps
    shared.check_range("gdpo", "eps", eps, 0, "1e-4 is TRL's.")
    if (lengths is not None) != (convention == "verl"):
        got = f"{convention!r} {'without' if lengths is None else 'with'} lengths"
        remedy = "The other conventions do not weight by length."
        raise shared.fail("gdpo", "lengths", "tokens for 'verl', else none", got, remedy)
    rows = shared.rows_of("gdpo", rewards, groups, components=True)
    weights_K = _weights("gdpo", rewards, reward_weights)
    rewards_NK = rows.rewards
    if convention == "nvlabs":
        rewards_NK = rewards_NK.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    singleton: Singleton = "reward" if convention == "verl" else "zero"
    sums_N = _sum_of_normalised(rewards_NK, rows.groups, weights_K, eps, singleton)
    if convention == "nvlabs" and rewards.shape[-1] == 1:
        return sums_N.reshape(rows.shape)
    scored_N = ~rewards_NK.isnan().all(1)
    if convention == "verl":
        (lengths_N,) = rows.per_row("gdpo", lengths=lengths)
        return weighted_whiten(sums_N, lengths_N * scored_N).reshape(rows.shape)
    # No mean to subtract: every group's and component's terms sum to 0, and so do the p.
    std = (sums_N.square().sum() / (scored_N.sum() - 1).clamp(min=1)).sqrt()
    return (sums_N * shared.reciprocal(std, eps)).reshape(rows.shape)
