"""Losses over whole groups: G samples of each of B prompts, ragged groups by a mask.

Errors are those of ``fastpo.diffusion.noise_errors``, lower for likelier samples. Padding may hold
anything.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastpo.checks import check_tensors
from fastpo.diffusion.losses._common import check_scale
from fastpo.losses._common import (
    REDUCTIONS,
    Reduction,
    UnpairedOutput,
    check_choice,
    check_not_negative,
    unpaired_output,
)
from fastpo.losses._groups import batch_mean_terms, prepare_groups
from fastpo.losses._lists import best_first, suffix_cross_entropy


def gdro(
    errors: Tensor,
    ref_errors: Tensor,
    scores: Tensor,
    mask: Tensor | None = None,
    beta: float = 12.0,
    tau: float = 0.05,
    gamma: float = 0.5,
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """GDRO: the order of a group, each place a soft choice by reward, beside a fit of the best.

    sum_i [logsumexp_{j >= i} s_j - sum_{j >= i} q_j s_j] + gamma e_1 with samples from best to
    worst, s = -beta (e - r) and q = softmax_{j >= i}(score_j / tau) (arXiv:2601.02036, eq. 5-9
    and 12). tau -> 0 is the Plackett-Luce likelihood of the order, and with two samples and gamma 0
    Diffusion-DPO (kappa 1).

    Args:
        errors: [B, G] errors e of the policy, flow target.
        ref_errors: [B, G] errors r of the reference; no gradient.
        scores: [B, G] rewards; no gradient. Of equals, the earlier one counts as the better.
        mask: [B, G] bool, True where there is a sample; all of them if not given.
        beta: strength of the tie to the reference, > 0; 12 with gamma 0.5 for rendered text, 6
            with gamma 1 for GenEval.
        tau: temperature of q in units of the scores, >= 0; 0 gives Plackett-Luce.
        gamma: weight of the best sample's error, >= 0.
        reduction: ``mean`` over prompts, ``sum`` or ``none``.

    Returns:
        UnpairedOutput; the rewards [B, G] are s, in the order given.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> out = gdro(-torch.tensor([[0.3, -0.1, 0.4]]), torch.zeros(1, 3),
        ...            torch.tensor([[0.9, 0.5, 0.2]]), beta=1.0, tau=0.5, gamma=0.0)
        >>> round(out.loss.item(), 4)
        1.9092
    """
    check_tensors("diffusion.losses.gdro", {"mask": mask}, scores=scores)
    name = "diffusion.losses.gdro"
    check_scale(name, "beta", beta)
    check_not_negative(name, "tau", tau)
    check_not_negative(name, "gamma", gamma)
    check_choice(name, "reduction", reduction, REDUCTIONS)
    errors_BG, ref_errors_BG, scores_BG, mask_BG = prepare_groups(
        name, mask, errors=errors, ref_errors=ref_errors, scores=scores.detach()
    )
    rewards_BG = -beta * (errors_BG - ref_errors_BG.detach())
    sorted_BG, sorted_errors_BG, scores_BG, mask_BG = best_first(
        scores_BG, mask_BG, rewards_BG, errors_BG
    )
    others_BGG = sorted_BG[:, None, :].expand(-1, sorted_BG.shape[1], -1)
    loss_B = suffix_cross_entropy(sorted_BG, others_BGG, mask_BG)
    if tau:
        # Plackett-Luce chooses s_i itself; the soft choice is q's mean of s_j.
        from_here_BGG = (mask_BG[:, :, None] & mask_BG[:, None, :]).triu()
        logits_BGG = (scores_BG[:, None, :] - scores_BG[:, :, None]) / tau
        lowest = torch.finfo(logits_BGG.dtype).min
        soft_BGG = logits_BGG.masked_fill(~from_here_BGG, lowest).softmax(2)
        differences_BGG = sorted_BG[:, :, None] - sorted_BG[:, None, :]
        loss_B = loss_B + torch.where(from_here_BGG, soft_BGG * differences_BGG, 0.0).sum((1, 2))
    loss_B = loss_B + gamma * sorted_errors_BG[:, 0]
    return unpaired_output(loss_B, rewards_BG, reduction)


def corrected_reward(reward: Tensor, quality: Tensor) -> Tensor:
    """GDRO's metric against hacked rewards: reward (quality - 3) + 0.2 (arXiv:2601.02036).

    Args:
        reward: of the trained task, any shape.
        quality: mean quality score of the same samples by UnifiedReward, from 1 to 5.

    Returns:
        The corrected reward, without gradient.

    Example:
        >>> corrected_reward(torch.tensor(0.9), torch.tensor(3.5))
        tensor(0.6500)
    """
    check_tensors("diffusion.losses.corrected_reward", reward=reward, quality=quality)
    return reward.detach() * (quality.detach() - 3) + 0.2


def dgpo(
    errors: Tensor,
    ref_errors: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    beta: float = 100.0,
    advantage_max: float = 5.0,
    kl_errors: Tensor | None = None,
    kl_weight: float = 1e-3,
    old_errors: Tensor | None = None,
    clip: float = 1e-4,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """Direct group preference optimisation: DPO between the better and the worse part of a group.

    mean_n sigmoid(S) A_n e_n + kl_weight mean_n |v_n - v_ref_n|^2, S = beta mean_n A_n (e_n - r_n)
    of the group, a constant (arXiv:2510.08425, the authors' code). beta times its gradient is that
    of -logsigmoid(-S); two samples with A = +-1 have that of Diffusion-DPO with kappa 1/2. Any
    sampler will do, ODE solvers too.

    Args:
        errors: [B, G] errors e of the policy.
        ref_errors: [B, G] errors r of the reference; no gradient.
        advantages: [B, G] A, as of ``fastpo.advantages.grpo``; no gradient.
        mask: [B, G] bool, True where there is a sample; all of them if not given.
        beta: strength of the tie to the reference, > 0.
        advantage_max: A is held in [-advantage_max, advantage_max].
        kl_errors: [B, G] mean |v - v_ref|^2, ``noise_errors`` of the policy's prediction to the
            reference's; None leaves the term out.
        kl_weight: weight of ``kl_errors``, >= 0.
        old_errors: [B, G] errors of the policy that the round began with. A sample whose ratio
            exp(old - e) has moved out of [1 - clip, 1 + clip] in the direction of its advantage
            has no gradient but that of the KL. None leaves no sample out.
        clip: half width of that band, > 0; 1e-3 to 1e-5 in the code.
        all_reduce: sums a tensor over ranks and returns it, for example
            ``fastpo.distributed.all_reduce_sum()``, where the samples of a group lie on several
            ranks: each rank then passes its own of the same B groups, in the same order.
        reduction: ``mean`` over all samples; ``sum`` or ``none``, of prompts whose mean this is.

    Returns:
        UnpairedOutput; the rewards [B, G] are -beta (e - r), ``group_weights`` [B] the sigmoids.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> out = dgpo(torch.tensor([[0.5, 0.7]]), torch.tensor([[0.4, 0.7]]),
        ...            torch.tensor([[1.0, -1.0]]), beta=2.0)
        >>> round(out.metrics["group_weights"].item(), 4), round(out.loss.item(), 4)
        (0.525, -0.0525)
    """
    name = "diffusion.losses.dgpo"
    check_scale(name, "beta", beta)
    check_scale(name, "advantage_max", advantage_max)
    check_scale(name, "clip", clip)
    check_not_negative(name, "kl_weight", kl_weight)
    check_choice(name, "reduction", reduction, REDUCTIONS)
    optional = {"kl_errors": kl_errors, "old_errors": old_errors}
    given = {argument: tensor for argument, tensor in optional.items() if tensor is not None}
    *values, mask_BG = prepare_groups(
        name, mask, errors=errors, ref_errors=ref_errors, advantages=advantages, **given
    )
    errors_BG, ref_errors_BG, advantages_BG = values[:3]
    given = dict(zip(given, values[3:], strict=True))
    advantages_BG = advantages_BG.detach().clamp(-advantage_max, advantage_max)
    rewards_BG = -beta * (errors_BG - ref_errors_BG).detach()
    counts_B = mask_BG.sum(1).to(errors_BG)
    sums_2B = torch.stack((-(advantages_BG * rewards_BG).sum(1), counts_B))
    if all_reduce is not None:
        sums_2B = all_reduce(sums_2B)
    weights_B = torch.sigmoid(sums_2B[0] / sums_2B[1].clamp(min=1))
    if "old_errors" in given:
        excess_BG = torch.expm1(given["old_errors"].detach() - errors_BG.detach())
        moved_BG = excess_BG * advantages_BG.sign() > clip
        errors_BG = torch.where(moved_BG, errors_BG.detach(), errors_BG)
    terms_BG = weights_B[:, None] * advantages_BG * errors_BG
    if "kl_errors" in given:
        terms_BG = terms_BG + kl_weight * given["kl_errors"]
    loss_B = batch_mean_terms(terms_BG.sum(1), counts_B)
    return unpaired_output(loss_B, rewards_BG, reduction, group_weights=weights_B)
