"""Rewards and verdicts of judges to what CGPO trains on: pairs, and one response per prompt.

Scores and verdicts are [B, K]: B prompts, K responses each; a response passes if every judge passes
it (arXiv:2409.20370). NaN marks a response that was not scored: it is never taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.data._checks import bools, fail, first_max, first_min, real, same_shape, scores_of
from fastpo.data.pairs import Pairs, pairs_where


def constrained_pairs(scores: Tensor, passed: Tensor) -> Pairs:
    """The best response that passes against the worst that fails, for :func:`fastpo.losses.codpo`.

    Where all pass, the worst of all is rejected (chosen and rejected are then one response if the
    scores are equal: only codpo's likelihood term acts). Where none passes there is no pair.

    CGPO's code multiplies rewards by verdicts of 0 and 1: a failing response then beats a passing
    one of negative reward, and a passing one can become the worst that fails. Here responses that
    are not eligible are left out instead.

    Args:
        scores: [B, K] rewards.
        passed: [B, K] bool, whether every judge passes the response.

    Returns:
        Pairs, in the order of prompts; the first of equally good and of equally bad responses.

    Raises:
        ValueError: shapes or types do not fit.

    Example:
        >>> scores, passed = torch.tensor([[-1.0, 0.5, -2.0]]), torch.tensor([[True, False, True]])
        >>> constrained_pairs(scores, passed)[:3]
        (tensor([0]), tensor([0]), tensor([1]))
    """
    scores_BK = scores_of("constrained_pairs", scores)
    known_BK = ~scores_BK.isnan()
    passed_BK = bools("constrained_pairs", "passed", passed, scores.shape) & known_BK
    failed_BK = ~passed_BK & known_BK
    barred_BK = passed_BK & failed_BK.any(1, keepdim=True)
    chosen_B = first_max(torch.where(passed_BK, scores_BK, torch.nan))
    rejected_B = first_min(torch.where(barred_BK, torch.nan, scores_BK))
    return pairs_where(passed_BK.any(1), chosen_B, rejected_B)


def crraft_choice(
    scores: Tensor,
    baseline_scores: Tensor,
    passed: Tensor,
    kl: Tensor,
    kl_max: float,
    baseline_passed: Tensor | None = None,
    baseline_kl: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One response to imitate for each prompt, and its weight, for :func:`fastpo.losses.crraft`.

    The response of the largest R = [kl <= kl_max] passed sigmoid(r - r_0), with weight R. Where
    none has R > 0 the baseline answer stands in with weight 1/2, if it passes the judges and the
    limit; else the prompt is skipped, with weight 0.

    Args:
        scores: [B, K] rewards r.
        baseline_scores: [B] rewards r_0 of the baseline answers.
        passed: [B, K] bool, whether every judge passes the response.
        kl: [B, K] log p - log ref of each response, in nats.
        kl_max: largest kl allowed.
        baseline_passed: [B] bool; no baseline answer stands in if not given.
        baseline_kl: [B] likewise; both or neither.

    Returns:
        Column [B], K for the baseline answer, and weight [B].

    Raises:
        ValueError: shapes or types do not fit.

    Example:
        >>> crraft_choice(torch.tensor([[1.0, 0.2]]), torch.tensor([0.3]),
        ...               torch.tensor([[False, True]]), torch.tensor([[2.0, 8.0]]), kl_max=10.0)
        (tensor([1]), tensor([0.4750]))
    """
    scores_BK = scores_of("crraft_choice", scores)
    kl_BK = real("crraft_choice", "kl", kl, "B K")
    baseline_B = real("crraft_choice", "baseline_scores", baseline_scores, "B")
    same_shape("crraft_choice", scores=scores, kl=kl)
    same_shape("crraft_choice", first_column=scores[:, 0], baseline_scores=baseline_scores)
    eligible_BK = bools("crraft_choice", "passed", passed, scores.shape) & (kl_BK <= kl_max)
    rewards_BK = torch.sigmoid(scores_BK - baseline_B[:, None])
    eligible_BK = eligible_BK & ~rewards_BK.isnan()
    weight_B, column_B = torch.where(eligible_BK, rewards_BK, 0.0).max(1)
    if (baseline_passed is None) != (baseline_kl is None):
        remedy = "Pass the other one as well."
        raise fail("crraft_choice", "baseline_passed", "it and baseline_kl", "one of them", remedy)
    if baseline_passed is not None:
        allowed_B = real("crraft_choice", "baseline_kl", baseline_kl, "B") <= kl_max
        passed_B = bools("crraft_choice", "baseline_passed", baseline_passed, allowed_B.shape)
        stands_in_B = (weight_B == 0) & passed_B & allowed_B
        column_B = torch.where(stands_in_B, scores.shape[1], column_B)
        weight_B = torch.where(stands_in_B, 0.5, weight_B)
    return column_B, weight_B
