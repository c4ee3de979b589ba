"""Weights of samples and of directions, from scores and from rankings."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fastpo.advantages._common import fail, floats
from fastpo.checks import check_tensors


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
    check_tensors("advantages.pu_rl_weights", scores=scores)
    if not 0 < temperature < math.inf:
        raise fail("pu_rl_weights", "temperature", "a number > 0", temperature, "1 is common.")
    (scores,) = floats(scores)
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
    along the sum; the authors alternate this with a line search. ``authors`` has m - 2 rho as the
    authors' code does: those do not sum to 0.

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
    check_tensors("advantages.zo_ranksgd_weights", ranking=ranking)
    if convention not in ("exact", "authors"):
        remedy = "Pick one of them."
        raise fail("zo_ranksgd_weights", "convention", "exact or authors", convention, remedy)
    if ranking.ndim != 1 or not max(2, ranking.shape[0]) <= count or not ranking.shape[0]:
        got = f"{list(ranking.shape)} and {count}"
        remedy = "Rank at least one of at least two directions."
        raise fail("zo_ranksgd_weights", "ranking, count", "[k] and m >= k", got, remedy)
    ranked = ranking.shape[0]
    pairs = ranked * (ranked - 1) / 2 + ranked * (count - ranked)
    best = count - 1 if convention == "exact" else count
    rank_k = torch.arange(ranked, device=ranking.device)
    weights_m = torch.full((count,), -ranked / pairs, dtype=dtype, device=ranking.device)
    return weights_m.scatter(0, ranking, (best - 2 * rank_k).to(weights_m) / pairs)
