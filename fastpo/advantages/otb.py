"""Advantages of tokens over the baseline of least variance."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.advantages._common import floats
from fastpo.advantages._tokens import active_tokens, check_tokens, discounted_sums
from fastpo.checks import check_tensors
from fastpo.groups import Groups, group_stats


def otb(
    rewards: Tensor,
    logprobs: Tensor,
    log_sum_sq_probs: Tensor,
    groups: Groups | Tensor | int,
    mask: Tensor | None = None,
    importance_weights: Tensor | None = None,
    handle_zero_tail: bool = False,
    multi_turn: bool = False,
) -> Tensor:
    """Optimal token baseline: returns less a mean over the group at each time step.

    A_t = G_t - B_t, G_t = sum_{s >= t} r_s, B_t = sum_i G_t W_t / (sum_i W_t + 1e-8) over the
    responses i of the group that have a token at t, W_t = sum_{s <= t} w_s,
    w_t = rho_t^2 (1 - 2 p_t + sum_v p_v^2)  (verl's optimal_token_baseline). A group of one has
    B = 0. w_t is the squared distance of the probabilities from the token's own one-hot vector.

    Args:
        rewards: [N, T], of each token.
        logprobs: [N, T] of the tokens under the policy before the update, in nats.
        log_sum_sq_probs: [N, T] log sum_v p_v^2 there, as :func:`fastpo.linear_token_stats` gives.
        groups: the size of every group, int ids [N], or :class:`fastpo.Groups`.
        mask: bool [N, T], tokens of the responses; all if not given.
        importance_weights: [N, T] rho, of the policy to the sampler; 1 if not given.
        handle_zero_tail: B = 0 for the one longest response of a group, from the length of the
            second longest on.
        multi_turn: a time step is the number of a token among those of the mask, not its column.
            Responses without a token are then no members of their group.

    Returns:
        [N, T] float32, or float64 for float64 inputs; 0 outside the mask. No gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Example:
        >>> logps = torch.tensor([[-0.5, -0.1], [-1.2, -0.2]])
        >>> rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        >>> otb(rewards, logps, 2 * logps, groups=2)
        tensor([[ 0.7593,  0.7608],
                [-0.2407, -0.2392]])
    """
    tokens = {"rewards": rewards, "logprobs": logprobs, "log_sum_sq_probs": log_sum_sq_probs}
    check_tensors("advantages.otb", **tokens)
    check_tokens("otb", tokens | {"importance_weights": importance_weights}, mask, None)
    rewards, logps, sq_log = floats(rewards, logprobs, log_sum_sq_probs)
    (N, T), device = rewards.shape, rewards.device
    groups = Groups.of(groups, N, device)
    active_NT = active_tokens(rewards, mask, None)

    # (1 - p)^2 + (sum_v p_v^2 - p^2): digits stay where p is close to 1.
    others_NT = -sq_log.exp() * torch.expm1((2 * logps - sq_log).clamp(max=0))
    weights_NT = torch.expm1(logps).square() + others_NT
    if importance_weights is not None:
        weights_NT = weights_NT * importance_weights.detach().to(logps).square()
    weights_NT = discounted_sums(weights_NT.flip(1), active_NT.flip(1), None).flip(1)
    returns_NT = discounted_sums(rewards, active_NT, None)

    steps_NT = torch.arange(T, device=device).expand(N, T)
    scored_NT = torch.where(active_NT, returns_NT, torch.nan)
    lengths_N = active_NT.sum(1).to(rewards)
    if multi_turn:
        steps_NT = active_NT.cumsum(1) - active_NT.long()
        scored_NT, weights_NT = _move(scored_NT, weights_NT, steps_NT, active_NT)
        lengths_N = torch.where(lengths_N > 0, lengths_N, torch.nan)

    stats = group_stats(scored_NT, groups, weights_NT)
    lengths = group_stats(lengths_N, groups)
    baselines_GT = stats.weighted_mean * (stats.weight / (stats.weight + 1e-8))
    baselines_GT = torch.where(lengths.count[:, None] > 1, baselines_GT, 0.0)
    # A row in no group has the index of the row of zeros.
    baselines_NT = torch.cat([baselines_GT, baselines_GT.new_zeros(1, T)])[groups.index]
    baselines_NT = baselines_NT.gather(1, steps_NT.clamp(max=max(T - 1, 0)))
    if handle_zero_tail:
        ends_G = torch.where(lengths.count > 1, lengths.second_max, torch.inf)
        ends_N1 = torch.cat([ends_G, ends_G.new_full((1,), torch.inf)])[groups.index][:, None]
        tail_NT = (lengths_N[:, None] > ends_N1) & (steps_NT >= ends_N1)
        baselines_NT = torch.where(tail_NT, 0.0, baselines_NT)
    return torch.where(active_NT, returns_NT - baselines_NT, 0.0)


def _move(
    scored_NT: Tensor, weights_NT: Tensor, steps_NT: Tensor, active_NT: Tensor
) -> tuple[Tensor, Tensor]:
    """Values and weights of active tokens moved to the columns ``steps_NT``; NaN elsewhere."""
    N, T = steps_NT.shape
    columns_NT = torch.where(active_NT, steps_NT, T)  # the others meet in a column that is left out
    empty = scored_NT.new_full((N, T + 1), torch.nan)
    moved = (empty.scatter(1, columns_NT, x)[:, :T] for x in (scored_NT, weights_NT))
    return tuple(moved)
