"""Advantages and returns of tokens: of a critic's values, of discounted rewards, and whitened.

Tokens are padded rows [B, T], or packed [N] with the cumulative lengths ``cu_seqlens`` [B + 1]. A
token counts if it lies in a sequence and in the mask; the others may hold anything, NaN included,
and get 0. Each recursion over the tokens of a batch is one launch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastpo.advantages._common import check_shapes, fail, floats, weighted_whiten
from fastpo.advantages._tokens import (
    active_tokens,
    check_tokens,
    discounted_sums,
    last_tokens,
    per_token,
)
from fastpo.checks import check_operands, check_tensors
from fastpo.distributed import all_reduce_sum
from fastpo.groups import Groups
from fastpo.ops import gae as ops

if TYPE_CHECKING:
    from fastpo.distributed import ProcessGroup


class TokenAdvantages(NamedTuple):
    """What a critic's loss and the policy's loss need, laid out as the tokens.

    Attributes:
        advantages: whitened where asked for.
        returns: what the values are to become; advantages before whitening plus values.
    """

    advantages: Tensor
    returns: Tensor


class TokenMasks(NamedTuple):
    """Which tokens train what, laid out as the tokens.

    Attributes:
        policy: bool, tokens of the policy's loss.
        value: bool, tokens of the critic's loss.
    """

    policy: Tensor
    value: Tensor


def _check_unit(function: str, **numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 <= number <= 1:
            raise fail(function, name, "a number in [0, 1]", number, "1 is no discount.")


def masked_whiten(
    values: Tensor, mask: Tensor | None = None, process_group: ProcessGroup | None = None
) -> Tensor:
    """Values less their mean, over their standard deviation, 0 outside the mask.

    (x - mu) / sqrt(var + 1e-8), mu = sum x / n, var = sum (x - mu)^2 / (n - 1), over the n values
    of the mask on the ranks of the group, as verl has it. A single value becomes 0.

    Args:
        values: of any shape.
        mask: bool, of that shape; all values if not given.
        process_group: ranks whose values have one mean and deviation; this one alone if
            not given.

    Returns:
        The shape of ``values``, float32, or float64 for float64 values. No gradient.

    Raises:
        ValueError: shapes do not fit or the mask is not bool.

    Example:
        >>> masked_whiten(torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.arange(4) < 3)
        tensor([-1.,  0.,  1.,  0.])
    """
    check_tensors("advantages.masked_whiten", {"mask": mask}, values=values)
    if mask is not None and (mask.shape != values.shape or mask.dtype != torch.bool):
        got = f"{mask.dtype} {list(mask.shape)}"
        remedy = "Call mask.bool()."
        raise fail("masked_whiten", "mask", f"bool {list(values.shape)}", got, remedy)
    (values,) = floats(values)
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    if process_group is None:
        return weighted_whiten(values, mask)
    return weighted_whiten(values, mask, all_reduce_sum(process_group))


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    whiten: bool = False,
    process_group: ProcessGroup | None = None,
) -> TokenAdvantages:
    """Generalised advantage estimates of tokens, and the returns a critic learns.

    A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t, returns_t = A_t + V_t
    (arXiv:1506.02438, eq. 16). Tokens outside the mask are passed over: t + 1 is the next token
    that counts.

    Args:
        rewards: [B, T] or packed [N], of each token.
        values: the critic's, of the state before each token.
        mask: bool, tokens of the responses; all if not given.
        gamma: discount, in [0, 1].
        lam: weight of longer returns, in [0, 1]; 1 for those of the rewards alone.
        bootstrap: [B] value after the last token, of responses that were cut short; 0 if not given.
        cu_seqlens: [B + 1] cumulative lengths of packed tokens.
        whiten: give ``advantages`` through :func:`masked_whiten`.
        process_group: ranks that are whitened together; this one alone if not given.

    Returns:
        Advantages and returns, laid out as the rewards, float32, or float64 for float64 rewards or
        values.

    Raises:
        ValueError: shapes, dtypes or devices do not fit or an option is out of range.

    Example:
        >>> rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.2, 0.3, 0.5]])
        >>> gae(rewards, values, lam=0.5).advantages
        tensor([[0.3250, 0.4500, 0.5000]])
    """
    check_tensors("advantages.gae", rewards=rewards, values=values)
    _check_unit("gae", gamma=gamma, lam=lam)
    tokens, rows = {"rewards": rewards, "values": values}, {"bootstrap": bootstrap}
    offsets = check_tokens("gae", tokens, mask, cu_seqlens, rows)
    rewards, values = floats(rewards, values)
    bootstrap = None if bootstrap is None else bootstrap.detach().to(rewards)
    inputs = (rewards, values, bootstrap, mask, offsets)
    advantages, returns = ops.gae(*inputs, gamma, lam, False, True)
    if whiten:
        active = active_tokens(advantages, mask, offsets)
        advantages = masked_whiten(advantages, active, process_group)
    return TokenAdvantages(advantages, returns)


def truncated_gae(
    rewards: Tensor,
    values: Tensor,
    finished: Tensor,
    mask: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
    cu_seqlens: Tensor | None = None,
    whiten: bool = False,
    process_group: ProcessGroup | None = None,
) -> TokenAdvantages:
    """:func:`gae` with responses cut before their end: the last value stands in for the next.

    V_l = V_{l-1} after the l tokens of a response that is not finished, 0 after one that is
    (EGAE of Truncated PPO, arXiv:2506.15050).

    Args:
        rewards: as in :func:`gae`.
        values: as in :func:`gae`.
        finished: bool [B], responses that have come to their end.
        mask: as in :func:`gae`.
        gamma: as in :func:`gae`.
        lam: as in :func:`gae`.
        cu_seqlens: as in :func:`gae`.
        whiten: as in :func:`gae`.
        process_group: as in :func:`gae`.

    Returns:
        As :func:`gae`.

    Raises:
        ValueError: as :func:`gae`, and ``finished`` is not bool [B].

    The paper's lambda was not read.

    Example:
        >>> rewards, values = torch.zeros(1, 3), torch.tensor([[0.2, 0.3, 0.5]])
        >>> truncated_gae(rewards, values, torch.tensor([False]), lam=0.5).advantages
        tensor([[0.2000, 0.2000, 0.0000]])
    """
    check_tensors("advantages.truncated_gae", rewards=rewards, values=values, finished=finished)
    tokens, rows = {"rewards": rewards, "values": values}, {"finished": finished}
    offsets = check_tokens("truncated_gae", tokens, mask, cu_seqlens, rows)
    _check_finished("truncated_gae", finished)
    (known,) = floats(values)
    last_B = last_tokens(active_tokens(rewards, mask, offsets), offsets)
    value_B = torch.cat([known.new_zeros(1), known.reshape(-1)])[last_B]
    bootstrap_B = torch.where(finished | (last_B == 0), 0.0, value_B)
    options = (gamma, lam, bootstrap_B, cu_seqlens, whiten, process_group)
    return gae(rewards, values, mask, *options)


def _check_finished(function: str, finished: Tensor) -> None:
    if finished.dtype != torch.bool:
        raise fail(function, "finished", "torch.bool", finished.dtype, "Call finished.bool().")


def tppo_masks(
    mask: Tensor,
    finished: Tensor,
    window_starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> TokenMasks:
    """Which tokens train the policy and which the critic, where responses grow window by window.

    The policy is trained on the tokens of the current window, the critic on responses that are
    finished (Truncated PPO, arXiv:2506.15050).

    Args:
        mask: bool [B, T] or packed [N], tokens of the responses so far.
        finished: bool [B], responses that have come to their end.
        window_starts: int64 [B], position in the sequence at which the current window starts; 0
            if not given.
        cu_seqlens: [B + 1] cumulative lengths of packed tokens.

    Returns:
        Two masks, laid out as ``mask``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Experimental: both rules were read in reviews; the paper's token filter and its window length
    were not.

    Example:
        >>> mask = torch.ones(2, 3, dtype=torch.bool)
        >>> tppo_masks(mask, torch.tensor([True, False]), torch.tensor([0, 2]))
        TokenMasks(policy=tensor([[ True,  True,  True],
                [False, False,  True]]), value=tensor([[ True,  True,  True],
                [False, False, False]]))
    """
    check_tensors("advantages.tppo_masks", mask=mask, finished=finished)
    rows = {"finished": finished, "window_starts": window_starts}
    offsets = check_tokens("tppo_masks", {}, mask, cu_seqlens, rows)
    _check_finished("tppo_masks", finished)
    active = active_tokens(mask, mask, offsets)
    value = active & per_token(finished, mask, offsets)
    if window_starts is None:
        return TokenMasks(active, value)
    if offsets is not None:
        window_starts = window_starts + offsets[:-1]
    places = torch.arange(mask.shape[-1], device=mask.device)
    return TokenMasks(active & (places >= per_token(window_starts, mask, offsets)), value)


def discounted_returns(
    rewards: Tensor,
    mask: Tensor | None = None,
    gamma: float = 1.0,
    cu_seqlens: Tensor | None = None,
    restart: bool = False,
) -> Tensor:
    """Rewards from each token to the end, later ones discounted.

    R_t = r_t + gamma R_{t+1}, t + 1 the next token that counts.

    Args:
        rewards: [B, T] or packed [N], of each token.
        mask: bool, tokens that count; all if not given.
        gamma: discount, in [0, 1].
        cu_seqlens: [B + 1] cumulative lengths of packed tokens.
        restart: count nothing that lies beyond a token outside the mask.

    Returns:
        Laid out as the rewards, float32, or float64 for float64 rewards. No gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not fit or gamma is out of range.

    Example:
        >>> discounted_returns(torch.tensor([[-0.1, -0.2, 1.0]]), gamma=0.9)
        tensor([[0.5300, 0.7000, 1.0000]])
    """
    check_tensors("advantages.discounted_returns", rewards=rewards)
    _check_unit("discounted_returns", gamma=gamma)
    offsets = check_tokens("discounted_returns", {"rewards": rewards}, mask, cu_seqlens)
    return discounted_sums(*floats(rewards), mask, offsets, gamma, restart)


def reinforce_pp(
    rewards: Tensor,
    mask: Tensor | None = None,
    gamma: float = 1.0,
    whiten: bool = True,
    cu_seqlens: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """REINFORCE++: returns of tokens, whitened over the batch.

    A = whiten(R), R_t = r_t + gamma R_{t+1}, which starts anew at a token outside the mask
    (arXiv:2501.03262, as in verl). The rewards have the KL in them: see :func:`k1_in_reward`.

    Args:
        rewards: [B, T] or packed [N], of each token.
        mask: bool, tokens of the responses; all if not given.
        gamma: discount, in [0, 1].
        whiten: False gives R.
        cu_seqlens: [B + 1] cumulative lengths of packed tokens.
        process_group: ranks that are whitened together; this one alone if not given.

    Returns:
        Laid out as the rewards, float32, or float64 for float64 rewards. No gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not fit or gamma is out of range.

    Example:
        >>> reinforce_pp(torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
        tensor([[ 0.8660,  0.8660],
                [-0.8660, -0.8660]])
    """
    check_tensors("advantages.reinforce_pp", rewards=rewards)
    _check_unit("reinforce_pp", gamma=gamma)
    offsets = check_tokens("reinforce_pp", {"rewards": rewards}, mask, cu_seqlens)
    returns = discounted_sums(*floats(rewards), mask, offsets, gamma, restart=True)
    if not whiten:
        return returns
    return masked_whiten(returns, active_tokens(returns, mask, offsets), process_group)


def remax(
    rewards: Tensor,
    greedy_rewards: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """ReMax's advantages of tokens: what is still to come, less the greedy response's reward.

    A_t = sum_{s >= t} r_s - r_greedy  (arXiv:2310.10505, in verl's form;
    :func:`~fastpo.advantages.remax_returns` is the authors').

    Args:
        rewards: [B, T] or packed [N], of each token.
        greedy_rewards: [B] of the greedy response to the same prompt; 0 for REINFORCE.
        mask: bool, tokens of the responses; all if not given.
        cu_seqlens: [B + 1] cumulative lengths of packed tokens.

    Returns:
        Laid out as the rewards, float32, or float64 for float64 inputs. No gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Example:
        >>> remax(torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([0.25]))
        tensor([[1.2500, 1.2500, 0.7500]])
    """
    check_tensors("advantages.remax", rewards=rewards, greedy_rewards=greedy_rewards)
    rows = {"greedy_rewards": greedy_rewards}
    offsets = check_tokens("remax", {"rewards": rewards}, mask, cu_seqlens, rows)
    rewards, greedy_B = floats(rewards, greedy_rewards)
    advantages = discounted_sums(rewards, mask, offsets) - per_token(greedy_B, rewards, offsets)
    return torch.where(active_tokens(rewards, mask, offsets), advantages, 0.0)


def step_returns(rewards: Tensor, trajectories: Groups, steps: Tensor, gamma: float) -> Tensor:
    """Discounted returns of environment steps, for each row of its trajectory.

    q_t = r_t + gamma q_{t+1}, t + 1 the next step there is of the trajectory (GiGPO,
    arXiv:2505.10978). Rows of one trajectory and step, such as several turns in one state of the
    environment, are one step: they share a return, and the reward of the first of them counts.

    Args:
        rewards: [N] of steps, in any order.
        trajectories: which rows make up each trajectory.
        steps: int [N], number of the step in its trajectory.
        gamma: discount, in [0, 1].

    Returns:
        [N] float32, or float64 for float64 rewards; 0 for rows in no trajectory. No gradient.

    Raises:
        ValueError: shapes do not fit or gamma is out of range.

    Example:
        >>> rewards, steps = torch.tensor([1.0, 0.0, 0.0, 2.0]), torch.tensor([2, 0, 1, 0])
        >>> step_returns(rewards, Groups.from_ids(torch.tensor([5, 5, 5, 6])), steps, gamma=0.5)
        tensor([1.0000, 0.2500, 0.5000, 2.0000])
    """
    check_operands("advantages.step_returns", rewards=rewards, steps=steps)
    _check_unit("step_returns", gamma=gamma)
    check_shapes("step_returns", "N", rewards=rewards, steps=steps)
    trajectories = Groups.of(trajectories, rewards.shape[0], rewards.device)
    (rewards_N,), index_N = floats(rewards), trajectories.index
    order_N = steps.argsort(stable=True)
    order_N = order_N[index_N[order_N].argsort(stable=True)]
    index_N, steps_N = index_N[order_N], steps[order_N]
    first_N = torch.ones_like(steps_N, dtype=torch.bool)
    first_N[1:] = (index_N[1:] != index_N[:-1]) | (steps_N[1:] != steps_N[:-1])
    offsets = torch.searchsorted(
        index_N, torch.arange(trajectories.count + 1, device=index_N.device)
    )
    returns_N = discounted_sums(rewards_N[order_N], first_N, offsets, gamma)
    places_N = torch.arange(len(first_N), device=first_N.device)
    leader_N = torch.where(first_N, places_N, 0).cummax(0).values
    return torch.empty_like(returns_N).scatter(0, order_N, returns_N[leader_N])
