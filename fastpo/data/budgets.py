"""How many responses to sample for which prompt, from estimated success rates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastpo.data._checks import fail


def _check_rates(function: str, success_rates: Sequence[float]) -> None:
    for rate in success_rates:
        if not 0 <= rate <= 1:
            expected, remedy = "probabilities in [0, 1]", "Clip the estimates."
            raise fail(function, "success_rates", expected, repr(rate), remedy)


def rollout_utility(budget: int, success_rate: float) -> float:
    """Expected number of failing rollouts in groups that have a success as well.

    U(B, p) = B (1 - p) [1 - (1 - p)^(B - 1)]  (arXiv:2602.03584): 0 for one rollout and for
    p = 0 or 1, where a group teaches nothing.

    Args:
        budget: B, number of rollouts of the prompt, >= 0.
        success_rate: p in [0, 1].

    Example:
        >>> rollout_utility(8, 0.5)
        3.96875
    """
    _check_rates("rollout_utility", [success_rate])
    failing = 1 - success_rate
    return budget * failing * (1 - failing ** (budget - 1)) if budget > 0 else 0.0


def rollout_budget(
    success_rates: Sequence[float], total: int, minimum: int = 2, maximum: int = 16
) -> list[int]:
    """Numbers of rollouts per prompt that add up to ``total`` and have the greatest utility.

    The utility of :func:`rollout_utility` is not concave in the budget, so that a greedy split can
    be wrong; this one is exact, by dynamic programming over prompts, in
    O(prompts * total * (maximum - minimum)). Ties go to fewer rollouts of later prompts.

    Args:
        success_rates: p of each prompt, in [0, 1], for example predicted by a value model.
        total: rollouts to share out.
        minimum: fewest rollouts of a prompt, >= 0.
        maximum: most rollouts of a prompt.

    Returns:
        One budget per prompt, in the order given.

    Raises:
        ValueError: a rate is out of range, or the total cannot be reached within the bounds.

    Example:
        >>> rollout_budget([0.05, 0.5, 0.9], total=24)
        [16, 6, 2]
    """
    _check_rates("rollout_budget", success_rates)
    prompts = len(success_rates)
    if not (0 <= minimum <= maximum and prompts * minimum <= total <= prompts * maximum):
        expected = f"{prompts} prompts times {minimum} to {maximum}"
        remedy = "Change the total or the bounds."
        raise fail("rollout_budget", "total", expected, repr(total), remedy)
    spare = total - prompts * minimum
    # best[s]: greatest utility of the prompts so far with s rollouts above their minima.
    best = torch.full((spare + 1,), -math.inf, dtype=torch.float64)
    best[0] = 0
    choices = []
    for rate in success_rates:
        options = torch.full((maximum - minimum + 1, spare + 1), -math.inf, dtype=torch.float64)
        for extra in range(min(maximum - minimum, spare) + 1):
            utility = rollout_utility(minimum + extra, rate)
            options[extra, extra:] = best[: spare + 1 - extra] + utility
        best, choice = options.max(0)
        choices.append(choice.tolist())
    budgets = []
    for choice in reversed(choices):
        budgets.append(minimum + choice[spare])
        spare -= choice[spare]
    return budgets[::-1]


def neyman_shares(success_rates: Sequence[float]) -> list[float]:
    """Shares of a sampling budget in proportion to sqrt(p (1 - p)): the least variance of the mean.

    Equal shares if every rate is 0 or 1.

    Args:
        success_rates: p of each prompt, in [0, 1].

    Returns:
        Shares that add up to 1, in the order given.

    Raises:
        ValueError: a rate is out of range.

    Example:
        >>> [round(share, 4) for share in neyman_shares([0.05, 0.5, 0.9])]
        [0.2141, 0.4912, 0.2947]
    """
    _check_rates("neyman_shares", success_rates)
    spreads = [math.sqrt(rate * (1 - rate)) for rate in success_rates]
    total = math.fsum(spreads)
    if total == 0:
        return [1 / len(spreads) for _ in spreads]
    return [spread / total for spread in spreads]


def success_pairs(rewards: Sequence[float]) -> list[tuple[int, int]]:
    """Indices (success, failure) of one context's queries, for the V0 value model's loss.

    A query is a success if (clip(reward, -1, 1) + 1) / 2 >= 0.5. The smaller class is repeated in
    turn until the larger one is used up (arXiv:2602.03584; the authors' code). A context without
    both classes gives none.

    Args:
        rewards: rewards of the queries of one context.

    Example:
        >>> success_pairs([1.0, -1.0, 0.5, 1.0])
        [(0, 1), (2, 1), (3, 1)]
    """
    successes = [index for index, reward in enumerate(rewards) if reward >= 0]
    failures = [index for index, reward in enumerate(rewards) if not reward >= 0]
    if not successes or not failures:
        return []
    count = max(len(successes), len(failures))
    return [(successes[i % len(successes)], failures[i % len(failures)]) for i in range(count)]
