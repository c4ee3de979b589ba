"""Rewards to advantages and weights: pure torch functions of small tensors.

Rewards come as [P, G], the G responses of each of P prompts. Results are float32, or float64 for
float64 inputs, and carry no gradient. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor


def _fail(function: str, argument: str, expected: str, got: object, remedy: str) -> ValueError:
    text = f"fastpo.advantages.{function}: {argument}: expected {expected}, got {got}. {remedy}"
    return ValueError(text)


def _floats(*tensors: Tensor) -> list[Tensor]:
    """Detached, in one dtype: float32, or float64 if any is."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    dtype = torch.float64 if wide else torch.float32
    return [tensor.detach().to(dtype) for tensor in tensors]


def _check_shapes(function: str, dims: str, **tensors: Tensor) -> None:
    """All have one shape, of as many dimensions as ``dims`` names."""
    shape = next(iter(tensors.values())).shape
    for name, tensor in tensors.items():
        if tensor.shape != shape or tensor.ndim != dims.count(",") + 1:
            expected = f"[{dims}], the same for {', '.join(tensors)}"
            raise _fail(function, name, expected, list(tensor.shape), "Reshape or expand it.")


def _check_rows(function: str, rows: int, **per_row: Tensor) -> None:
    for name, tensor in per_row.items():
        if tensor.shape != (rows,):
            remedy = "One value per response."
            raise _fail(function, name, f"[B], B = {rows}", list(tensor.shape), remedy)


def rloo(
    rewards: Tensor,
    kl: Tensor | None = None,
    beta: float = 0.05,
    reward_range: tuple[float, float] | None = None,
    normalize: bool = False,
) -> Tensor:
    """Leave-one-out advantages: the reward minus the mean of the prompt's other rewards.

    A_i = R_i - mean_{j != i} R_j, R = clip(rewards) - beta kl  (arXiv:2402.14740, in the form of
    TRL's trainer). Responses whose reward is NaN are left out of every mean and have advantage 0,
    as has the only scorable response of a prompt. Other prompts' advantages sum to 0.

    Args:
        rewards: [P, G], NaN where a response could not be scored.
        kl: [P, G] sums of log p - log ref over each response's tokens, under the policy that wrote
            it. Not the estimator that is never negative.
        beta: weight of ``kl``, >= 0.
        reward_range: lowest and highest reward; no clip if not given.
        normalize: subtract the mean and divide by the standard deviation (n - 1) plus 1e-4, over
            all scorable responses of the batch.

    Returns:
        [P, G].

    Raises:
        ValueError: shapes do not fit or beta is out of range.

    Example:
        >>> rloo(torch.tensor([[1.0, float("nan"), 0.5, 0.2]]))
        tensor([[ 0.6500,  0.0000, -0.1000, -0.5500]])
    """
    if not 0 <= beta < math.inf:
        raise _fail("rloo", "beta", "a finite number >= 0", beta, "0 leaves the KL out.")
    if reward_range is not None and not reward_range[0] <= reward_range[1]:
        raise _fail("rloo", "reward_range", "lowest, highest", reward_range, "Swap them.")
    kl = torch.zeros_like(rewards) if kl is None else kl
    _check_shapes("rloo", "P, G", rewards=rewards, kl=kl)
    rewards_PG, kl_PG = _floats(rewards, kl)
    scorable_PG = ~rewards_PG.isnan()
    if reward_range is not None:
        rewards_PG = rewards_PG.clamp(*reward_range)
    rewards_PG = torch.where(scorable_PG, rewards_PG - beta * kl_PG, 0.0)
    counts_P1 = scorable_PG.sum(1, keepdim=True)
    others_PG = (rewards_PG.sum(1, keepdim=True) - rewards_PG) / (counts_P1 - 1).clamp(min=1)
    valid_PG = scorable_PG & (counts_P1 > 1)
    advantages_PG = torch.where(valid_PG, rewards_PG - others_PG, 0.0)
    if normalize:
        count = valid_PG.sum()
        centred_PG = advantages_PG - advantages_PG.sum() / count.clamp(min=1)
        centred_PG = torch.where(valid_PG, centred_PG, 0.0)
        advantages_PG = centred_PG / (
            (centred_PG.square().sum() / (count - 1).clamp(min=1)).sqrt() + 1e-4
        )
    return advantages_PG


def remax_returns(
    rewards: Tensor,
    greedy_rewards: Tensor,
    policy: Tensor,
    ref: Tensor,
    mask: Tensor,
    gamma: float = 0.95,
    kl_coef: float = 0.1,
    clip: float = 5.0,
) -> Tensor:
    """ReMax's return of each token: the reward above that of the greedy response, minus a KL.

    gamma^(T - t + 1) R - kl_coef (log p_t - log ref_t), R = clip(reward - greedy reward, +-clip),
    t = 1 ... T over the tokens of the response (arXiv:2310.10505, the authors' code). gamma counts
    once at the last token, and a token has its own KL alone.

    Args:
        rewards: [B] of sampled responses.
        greedy_rewards: [B] of the greedy response to the same prompt.
        policy: [B, T] log-probs of the sampled tokens under the policy that wrote them, in nats.
        ref: [B, T] the same under the reference.
        mask: [B, T] bool, true for tokens of the response.
        gamma: discount, in (0, 1]; the authors' script for 7B models has 0.99.
        kl_coef: weight of the KL, >= 0; there 0.05.
        clip: bound of R, > 0.

    Returns:
        [B, T], 0 outside of the mask.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> zeros, mask = torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)
        >>> remax_returns(torch.tensor([2.0]), torch.tensor([0.0]), zeros, zeros, mask, gamma=0.9)
        tensor([[1.4580, 1.6200, 1.8000]])
    """
    if not 0 < gamma <= 1:
        raise _fail("remax_returns", "gamma", "a number in (0, 1]", gamma, "1 is no discount.")
    if not (0 <= kl_coef < math.inf and clip > 0):
        got = f"{kl_coef} and {clip}"
        raise _fail("remax_returns", "kl_coef, clip", "numbers >= 0 and > 0", got, "See defaults.")
    _check_shapes("remax_returns", "B, T", policy=policy, ref=ref, mask=mask)
    rows = policy.shape[0]
    _check_rows("remax_returns", rows, rewards=rewards, greedy_rewards=greedy_rewards)
    rewards_B, greedy_B, policy_BT, ref_BT = _floats(rewards, greedy_rewards, policy, ref)
    gain_B = (rewards_B - greedy_B).clamp(-clip, clip)
    counted_BT = mask.cumsum(1).to(policy_BT)  # a power of an integer tensor would be float32
    left_BT = counted_BT[:, -1:] - counted_BT + 1  # tokens from here to the end, this one included
    returns_BT = gamma**left_BT * gain_B[:, None] - kl_coef * (policy_BT - ref_BT)
    return torch.where(mask, returns_BT, 0.0)


def crpg_rewards(
    scores: Tensor, baseline_scores: Tensor, passed: Tensor, kl: Tensor, kl_max: float
) -> Tensor:
    """Calibrated, regularised rewards of CGPO's policy gradient.

    passed * sigmoid(r - r_0) * max(0, 1 - kl / kl_max)  (arXiv:2409.20370).

    Args:
        scores: rewards r, any shape.
        baseline_scores: rewards r_0 of a baseline answer to the same prompt.
        passed: bool, whether every judge passes the response.
        kl: log p - log ref of each response, in nats.
        kl_max: kl at which the reward is 0, > 0; infinity switches it off.

    Returns:
        The shape of ``scores``.

    Raises:
        ValueError: shapes do not fit or kl_max is out of range.

    Example:
        >>> crpg_rewards(torch.tensor([1.0, 0.2]), torch.tensor([0.3, 0.3]),
        ...              torch.tensor([True, False]), torch.tensor([2.0, 8.0]), kl_max=10.0)
        tensor([0.5346, 0.0000])
    """
    if not kl_max > 0:
        raise _fail("crpg_rewards", "kl_max", "a number > 0", kl_max, "Infinity is no limit.")
    tensors = {"baseline_scores": baseline_scores, "passed": passed, "kl": kl}
    for name, tensor in tensors.items():
        if tensor.shape != scores.shape:
            expected, got = f"{list(scores.shape)} as scores", list(tensor.shape)
            raise _fail("crpg_rewards", name, expected, got, "Expand it to the responses.")
    scores, baseline_scores, kl = _floats(scores, baseline_scores, kl)
    rewards = torch.sigmoid(scores - baseline_scores) * (1 - kl / kl_max).clamp(min=0)
    return torch.where(passed, rewards, 0.0)


def pu_rl_weights(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """Group weights from scores against an anchor: softmax(s / temperature) over the group.

    (arXiv:2601.20687.) Advantages are weights - 1 / G, which sum to 0.

    Args:
        scores: [..., G] the student's scores of its samples, with the teacher's answer in view.
        temperature: > 0.

    Returns:
        [..., G], sums 1.

    Raises:
        ValueError: temperature is out of range.

    Experimental: the group form is second-hand; the paper's equation was not read.

    Example:
        >>> pu_rl_weights(torch.tensor([4.0, 3.0, 1.0]))
        tensor([0.7054, 0.2595, 0.0351])
    """
    if not 0 < temperature < math.inf:
        raise _fail("pu_rl_weights", "temperature", "a number > 0", temperature, "1 is common.")
    (scores,) = _floats(scores)
    return torch.softmax(scores / temperature, -1)


def zo_ranksgd_weights(
    ranking: Tensor,
    count: int,
    convention: Literal["exact", "authors"] = "exact",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weights of random directions, from the ranking of the best few of them.

    sum_i w_i d_i is the mean of d_i - d_j over all pairs with i known to be better than j
    (arXiv:2303.03751). Of m directions k are ranked: the one of rank rho = 0 ... k - 1 has weight
    (m - 1 - 2 rho) / E, all others -k / E, E = k (k - 1) / 2 + k (m - k) pairs. The point moves
    along the sum. ``authors`` has m - 2 rho as the authors' code does: those do not sum to 0.

    Args:
        ranking: [k] indices of the ranked directions, best first.
        count: m, at least 2 and k.
        convention: ``exact`` or ``authors``.
        dtype: of the weights.

    Returns:
        [m].

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> zo_ranksgd_weights(torch.tensor([2, 0]), 4)
        tensor([ 0.2000, -0.4000,  0.6000, -0.4000])
    """
    if convention not in ("exact", "authors"):
        remedy = "Pick one of them."
        raise _fail("zo_ranksgd_weights", "convention", "exact or authors", convention, remedy)
    if ranking.ndim != 1 or not max(2, ranking.shape[0]) <= count or not ranking.shape[0]:
        got = f"{list(ranking.shape)} and {count}"
        remedy = "Rank at least one of at least two directions."
        raise _fail("zo_ranksgd_weights", "ranking, count", "[k] and m >= k", got, remedy)
    ranked = ranking.shape[0]
    pairs = ranked * (ranked - 1) / 2 + ranked * (count - ranked)
    best = count - 1 if convention == "exact" else count
    rank_k = torch.arange(ranked, device=ranking.device)
    weights_m = torch.full((count,), -ranked / pairs, dtype=dtype, device=ranking.device)
    return weights_m.scatter(0, ranking, (best - 2 * rank_k).to(weights_m) / pairs)
