"""Losses over lists: K responses to each of B prompts, ragged lists by a mask.

Tensors are [B, K]: summed log-probs per response in nats, token counts, scores (higher is better).
Padding may hold anything. ``reduction`` is over prompts; the rewards of the result are [B, K].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpo.bounds import hold
from fastpo.checks import check_tensors
from fastpo.inputs import Trained
from fastpo.losses._common import (
    LARGEST_EXPONENT,
    REDUCTIONS,
    Reduction,
    UnpairedOutput,
    check_choice,
    check_not_negative,
    check_positive,
    fail,
    mean_logprobs,
    reduce,
    unpaired_output,
)
from fastpo.losses._lists import best_first, masked_mean, prepare_lists, suffix_cross_entropy


def pro(
    policy: Trained,
    counts: Tensor,
    scores: Tensor,
    mask: Tensor | None = None,
    sft_weight: float = 0.05,
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """Preference ranking optimisation: each response against all worse ones, by score gaps.

    With responses from best to worst, mean log-probs m and gaps T_ij = r_i - r_j, T_i = max_j T_ij:
    sum_i [log(exp(T_i m_i) + sum_{j>i} exp(T_ij m_j)) - T_i m_i] - sft_weight (n - 1)^2 S_best
    (arXiv:2306.17492; the authors' code, whose second term takes the summed log-prob and grows with
    the list). Ties give a constant. The default of ``sft_weight`` is from memory.

    Args:
        policy: [B, K] summed log-probs, in any order.
        counts: [B, K] tokens of the responses.
        scores: [B, K] rewards; no gradient. Ties keep the order given.
        mask: [B, K] bool, True where there is a response; all of them if not given.
        sft_weight: weight of the best response's likelihood, >= 0.
        reduction: ``mean`` over prompts, ``sum`` or ``none``.

    Returns:
        UnpairedOutput; the rewards [B, K] are m, in the order given.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> out = pro(torch.tensor([[-2.4, -3.0]]), torch.tensor([[3, 3]]),
        ...           torch.tensor([[2.0, 1.0]]))
        >>> round(out.loss.item(), 4)
        0.7181
    """
    check_not_negative("pro", "sft_weight", sft_weight)
    check_choice("pro", "reduction", reduction, REDUCTIONS)
    policy_BK, counts_BK, scores_BK, mask_BK = prepare_lists(
        "pro", mask, policy=policy, counts=counts, scores=scores
    )
    rewards_BK = mean_logprobs(policy_BK, counts_BK)
    sums_BK, means_BK, sorted_BK, mask_BK = best_first(
        scores_BK.detach(), mask_BK, policy_BK, rewards_BK
    )
    last_B1 = sorted_BK.masked_fill(~mask_BK, torch.inf).amin(1, keepdim=True)
    widest_BK = torch.where(mask_BK, sorted_BK - last_B1, 0)
    gaps_BKK = sorted_BK[:, :, None] - sorted_BK[:, None, :]
    ranking_B = suffix_cross_entropy(widest_BK * means_BK, gaps_BKK * means_BK[:, None, :], mask_BK)
    worse_B = (mask_BK.sum(1) - 1).clamp(min=0).to(sums_BK)
    loss_B = ranking_B - sft_weight * worse_B**2 * sums_BK[:, 0]
    return unpaired_output(loss_B, rewards_BK, reduction, ranking=reduce(ranking_B, "mean"))


def pl_dpo(
    policy: Trained,
    ref: Tensor,
    scores: Tensor,
    mask: Tensor | None = None,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """DPO on rankings: the Plackett-Luce likelihood of the whole order.

    -sum_i [g_i - logsumexp(g_i, ..., g_n)] with responses from best to worst and
    g = beta (policy - ref)  (arXiv:2305.18290, appendix). Two responses give DPO.

    Args:
        policy: [B, K] summed log-probs, in any order.
        ref: [B, K] the same under the reference model.
        scores: [B, K] scores whose order is the ranking; ties keep the order given.
        mask: [B, K] bool, True where there is a response; all of them if not given.
        beta: strength of the tie to the reference, > 0.
        reduction: ``mean`` over prompts, ``sum`` or ``none``.

    Returns:
        UnpairedOutput; the rewards [B, K] are g, in the order given.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Experimental: the formula is written from memory of the appendix.

    Example:
        >>> out = pl_dpo(torch.tensor([[0.4, 0.1, -0.3]]), torch.zeros(1, 3),
        ...              torch.tensor([[3.0, 2.0, 1.0]]), beta=0.5)
        >>> round(out.loss.item(), 4)
        1.5403
    """
    check_positive("pl_dpo", "beta", beta)
    check_choice("pl_dpo", "reduction", reduction, REDUCTIONS)
    policy_BK, ref_BK, scores_BK, mask_BK = prepare_lists(
        "pl_dpo", mask, policy=policy, ref=ref, scores=scores
    )
    rewards_BK = beta * (policy_BK - ref_BK.detach())
    sorted_BK, _, mask_BK = best_first(scores_BK.detach(), mask_BK, rewards_BK)
    others_BKK = sorted_BK[:, None, :].expand(-1, sorted_BK.shape[1], -1)
    return unpaired_output(
        suffix_cross_entropy(sorted_BK, others_BKK, mask_BK), rewards_BK, reduction
    )


def _whitened(scores_BK: Tensor, mask_BK: Tensor) -> Tensor:
    """(score - mean) / (unbiased std + 1e-8) of each list; 0 in lists of one and at padding."""
    centred_BK = torch.where(mask_BK, scores_BK - masked_mean(scores_BK, mask_BK)[:, None], 0)
    variance_B = centred_BK.square().sum(1) / (mask_BK.sum(1) - 1).clamp(min=1)
    return centred_BK / (variance_B.sqrt()[:, None] + 1e-8)


def adpo(
    policy: Trained,
    ref: Tensor,
    scores: Tensor,
    mask: Tensor | None = None,
    tau: float | Tensor = 0.8,
    beta_r: float = 0.5,
    kl_weight: float = 0.0,
    drop_unrewarded: bool = False,
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """Anchored direct preference optimisation: match a soft target over a group of responses.

    -sum_i q_i log softmax(l)_i with l = (policy - anchor) / tau and q = softmax(z / beta_r), z the
    whitened scores of the group  (arXiv:2510.18913; the author's port to verl). The mean is over
    groups. A group of equal scores has a uniform target: it is pulled to the anchor, not skipped.

    Args:
        policy: [B, K] summed log-probs of the responses.
        ref: [B, K] the same under the anchor: the old policy or the reference model.
        scores: [B, K] rewards or advantages; no gradient.
        mask: [B, K] bool, True where there is a response; all of them if not given.
        tau: temperature of the anchored log-probs, > 0, or one per group [B], as from
            :func:`adpo_adaptive_tau`.
        beta_r: temperature of the target, > 0.
        kl_weight: weight of the responses' mean k3 estimate of KL(policy || anchor),
            exp(x) - 1 - x with x = anchor - policy summed over tokens, held at x = 80 (700 in
            float64): beyond, a response gets no gradient from it.
        drop_unrewarded: leave out groups whose scores are all <= 0, from the mean as well.
        reduction: ``mean`` over the groups that are left, ``sum`` or ``none`` (dropped groups 0).

    Returns:
        UnpairedOutput; the rewards [B, K] are l.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> out = adpo(torch.tensor([[0.3, -0.2, 0.1, -0.4]]), torch.zeros(1, 4),
        ...            torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
        >>> round(out.loss.item(), 4)
        1.4421
    """
    if not isinstance(tau, Tensor):
        check_positive("adpo", "tau", tau)
    elif tau.shape != policy.shape[:1]:
        remedy = "Give one temperature per group."
        raise fail("adpo", "tau", f"shape {list(policy.shape[:1])}", f"{list(tau.shape)}", remedy)
    check_positive("adpo", "beta_r", beta_r)
    check_not_negative("adpo", "kl_weight", kl_weight)
    check_choice("adpo", "reduction", reduction, REDUCTIONS)
    policy_BK, ref_BK, scores_BK, mask_BK = prepare_lists(
        "adpo", mask, policy=policy, ref=ref, scores=scores
    )
    scores_BK = scores_BK.detach()
    log_ratio_BK = policy_BK - ref_BK.detach()
    temperature = tau.detach().to(policy_BK)[:, None] if isinstance(tau, Tensor) else tau
    anchored_BK = log_ratio_BK / temperature
    lowest = torch.finfo(policy_BK.dtype).min
    target_BK = (_whitened(scores_BK, mask_BK) / beta_r).masked_fill(~mask_BK, lowest).softmax(1)
    log_share_BK = anchored_BK.masked_fill(~mask_BK, lowest).log_softmax(1)
    loss_B = -torch.where(mask_BK, target_BK * log_share_BK, 0).sum(1)
    if kl_weight:
        # Held in both terms: alone, the linear one would push a response beyond the bound away.
        excess_BK = hold(-log_ratio_BK, high=LARGEST_EXPONENT[log_ratio_BK.dtype])
        k3_BK = torch.expm1(excess_BK) - excess_BK
        loss_B = loss_B + kl_weight * masked_mean(k3_BK, mask_BK)
    if not drop_unrewarded:
        return unpaired_output(loss_B, anchored_BK, reduction)
    kept_B = (mask_BK & (scores_BK > 0)).any(1)
    return unpaired_output(loss_B, anchored_BK, reduction, kept_B, kept=kept_B)


def adpo_adaptive_tau(
    policy: Tensor,
    counts: Tensor,
    scores: Tensor,
    vocabulary: int,
    mask: Tensor | None = None,
    tau: float = 0.8,
    low: float = 0.05,
    high: float = 5.0,
) -> Tensor:
    """Temperatures of :func:`adpo` by group: higher where the policy is unsure and rewards are low.

    tau (1 + H / 2 + (1 - H)(1 - R) / 2) held in [low, high]; H = mean(-log p) / log(vocabulary)
    over the tokens of the group, held in [0, 1]; R = the group's mean score, scaled to [0, 1] by
    the lowest and highest of the batch, 1/2 if all are alike  (arXiv:2510.18913; the author's port
    to verl). No gradient.

    Args:
        policy: [B, K] summed log-probs of the responses.
        counts: [B, K] tokens of the responses.
        scores: [B, K] rewards.
        vocabulary: number of tokens of the vocabulary, >= 2.
        mask: [B, K] bool, True where there is a response; all of them if not given.
        tau: temperature at H = 0, R = 1, > 0.
        low: smallest temperature.
        high: largest temperature.

    Returns:
        [B] temperatures.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> adpo_adaptive_tau(torch.tensor([[-1.0, -2.0]]), torch.tensor([[2, 2]]),
        ...                   torch.tensor([[1.0, 0.0]]), vocabulary=1000)
        tensor([1.0217])
    """
    check_tensors("losses.adpo_adaptive_tau", {"mask": mask}, policy=policy, scores=scores)
    check_positive("adpo_adaptive_tau", "tau", tau)
    if vocabulary < 2:
        remedy = "Pass the size of the model's vocabulary."
        raise fail("adpo_adaptive_tau", "vocabulary", "at least 2", repr(vocabulary), remedy)
    if not 0 < low <= high < math.inf:
        remedy = "The published bounds are 0.05 and 5."
        raise fail("adpo_adaptive_tau", "low, high", "0 < low <= high", f"{low}, {high}", remedy)
    policy_BK, counts_BK, scores_BK, mask_BK = prepare_lists(
        "adpo_adaptive_tau", mask, policy=policy.detach(), counts=counts, scores=scores.detach()
    )
    unsure_B = -mean_logprobs(policy_BK.sum(1), counts_BK.sum(1)) / math.log(vocabulary)
    unsure_B = unsure_B.clamp(0, 1)
    mean_B = masked_mean(scores_BK, mask_BK)
    if not mean_B.numel():
        return mean_B
    lowest, highest = mean_B.aminmax()
    spread = highest - lowest
    share_B = torch.where(spread > 0, (mean_B - lowest) / spread.clamp(min=1e-8), 0.5)
    return (tau * (1 + 0.5 * unsure_B + 0.5 * (1 - unsure_B) * (1 - share_B))).clamp(low, high)
