"""Scores of responses: several rewards to one, judgements to a mean, a penalty for no end."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.data._checks import bools, fail, real


def weighted_rewards(rewards: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the rewards of several functions, over those that gave one.

    sum_r w_r rewards_r; a NaN of one function is left out of the sum and its weight is not shared
    out. A response no function scored stays NaN, so that no rule takes it for a score of 0 (TRL's
    sum gives 0 there).

    Args:
        rewards: [R, B, K] rewards of R functions.
        weights: [R].

    Returns:
        [B, K] scores.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> nan = float("nan")
        >>> weighted_rewards(torch.tensor([[[1.0, nan, nan]], [[2.0, 2.0, nan]]]),
        ...                  torch.tensor([1.0, 0.5]))
        tensor([[2., 1., nan]])
    """
    rewards_RBK = real("weighted_rewards", "rewards", rewards, "R B K")
    weights_R = real("weighted_rewards", "weights", weights, "R").to(rewards_RBK.dtype)
    if weights_R.shape[0] != rewards_RBK.shape[0]:
        expected = f"one weight for each of {rewards_RBK.shape[0]} rewards"
        got = f"{weights_R.shape[0]}"
        raise fail("weighted_rewards", "weights", expected, got, "Weight 1 counts one in full.")
    unknown_BK = rewards_RBK.isnan().all(0)
    total_BK = (rewards_RBK * weights_R[:, None, None]).nansum(0)
    return total_BK.masked_fill(unknown_BK, torch.nan)


def mean_judgements(judgements: Tensor) -> Tensor:
    """Mean of several judgements of each response, over those that could be read.

    Self-Rewarding (arXiv:2401.10020) averages three sampled judgements on a scale of 0 to 5.

    Args:
        judgements: [B, K, J]; NaN for one that could not be parsed.

    Returns:
        [B, K] scores; NaN for a response without a judgement.

    Raises:
        ValueError: the shape does not fit.

    Example:
        >>> mean_judgements(torch.tensor([[[4, 5, 4], [3, 3, 3]]])).tolist()
        [[4.333333333333333, 3.0]]
    """
    return real("mean_judgements", "judgements", judgements, "B K J").nanmean(-1)


def penalize_missing_eos(scores: Tensor, has_eos: Tensor, penalty: float) -> Tensor:
    """Scores less ``penalty`` for responses that do not end with the end-of-sequence token.

    Args:
        scores: [B, K].
        has_eos: bool [B, K].
        penalty: what is taken off, in units of the score.

    Returns:
        [B, K] scores.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> penalize_missing_eos(torch.tensor([[0.5, 0.9]]), torch.tensor([[True, False]]), 1.0)
        tensor([[ 0.5000, -0.1000]])
    """
    scores_BK = real("penalize_missing_eos", "scores", scores, "B K")
    has_eos_BK = bools("penalize_missing_eos", "has_eos", has_eos, scores_BK.shape)
    return scores_BK - penalty * (~has_eos_BK).to(scores_BK.dtype)
