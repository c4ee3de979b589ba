"""Losses that set the better responses of a group against the worse ones.

Tensors are [P, G]: P prompts with the G responses of each, groups of other sizes by a mask.
Padding may hold anything. ``reduction`` is over prompts; the rewards of the result are [P, G].

A call must see groups as a whole: a batch is cut between groups, never inside one. Several ranks,
or micro-batches, each with whole groups of its own, are enough. The mean of their losses is that
of the whole batch where they hold equally many prompts (:func:`trpa`: pairs).

Statistics come from token log-probs [B, T] with the responses to one prompt next to each other, as
``fastpo.sequence_sums(logprobs, mask).view(-1, G)``.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpo.inputs import Trained
from fastpo.losses._common import (
    REDUCTIONS,
    Reduction,
    UnpairedOutput,
    check_choice,
    check_flags,
    check_not_negative,
    check_positive,
    fail,
    mean_logprobs,
    unpaired_output,
)
from fastpo.losses._groups import batch_mean_terms, check_kl, prepare_groups
from fastpo.losses._lists import masked_mean


def trpa(
    policy: Trained,
    ref: Tensor,
    counts: Tensor,
    levels: Tensor,
    mask: Tensor | None = None,
    beta: float = 0.1,
    anisotropy: float = 2.5,
    kl: Trained | None = None,
    kl_weight: float = 0.001,
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """Trust region preference approximation: all pairs of a group whose levels differ.

    mean over all pairs of the batch of -log sigmoid(a beta (q_i - q_j)), level_i < level_j, with q
    the mean log-ratio per token and a = anisotropy if level_i is 1, else 1  (arXiv:2504.04524, the
    authors' code). A batch without any pair gets the mean over responses of -log sigmoid(s q), s =
    1 at level 1 and -1 below. Two responses of two levels at anisotropy 1 are DPO on means.

    Args:
        policy: [P, G] summed log-probs of the responses, nats, any float dtype.
        ref: [P, G] the same under the frozen reference model.
        counts: [P, G] tokens of the responses.
        levels: [P, G] levels of preference, 1 the best; in the paper, on mathematics, 1 right, 2
            wrong but readable, 3 no readable answer, 4 wrong format.
        mask: [P, G] bool, True where there is a response; all of them if not given.
        beta: strength of the tie to the reference, > 0.
        anisotropy: factor of the pairs with a response of level 1, > 0.
        kl: 0-d, the trust region with its gradient: the mean over tokens of the k3 estimate
            between the current policy and the one before, or (k3 + 0.25).sqrt() of it; None
            leaves the term out.
        kl_weight: weight of ``kl``, >= 0.
        reduction: ``mean``, ``sum`` or ``none``. Each prompt carries its share, so that the mean of
            ``none`` is the mean over pairs, and all of ``kl``.

    Returns:
        UnpairedOutput; the rewards [P, G] are beta q, the metric ``pairs`` their number.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> out = trpa(torch.tensor([[0.1, -0.05, 0.02, 0.2]]), torch.zeros(1, 4),
        ...            torch.ones(1, 4), torch.tensor([[1, 2, 2, 3]]))
        >>> round(out.loss.item(), 4), out.metrics["pairs"].item()
        (0.6943, 5)
    """
    check_positive("trpa", "beta", beta)
    check_positive("trpa", "anisotropy", anisotropy)
    check_kl("trpa", kl, kl_weight)
    check_choice("trpa", "reduction", reduction, REDUCTIONS)
    policy_PG, ref_PG, counts_PG, levels_PG, mask_PG = prepare_groups(
        "trpa", mask, policy=policy, ref=ref, counts=counts, levels=levels
    )
    ratio_PG = mean_logprobs(policy_PG - ref_PG.detach(), counts_PG)
    is_best_PG = levels_PG == 1
    better_PGG = levels_PG[:, :, None] < levels_PG[:, None, :]
    better_PGG = better_PGG & mask_PG[:, :, None] & mask_PG[:, None, :]
    scale_PG = torch.full_like(ratio_PG, beta).masked_fill(is_best_PG, beta * anisotropy)
    margins_PGG = scale_PG[:, :, None] * (ratio_PG[:, :, None] - ratio_PG[:, None, :])
    pair_sums_P = torch.where(better_PGG, -logsigmoid(margins_PGG), 0.0).sum((1, 2))
    pairs_P = better_PGG.sum((1, 2))
    own_PG = -logsigmoid(torch.where(is_best_PG, ratio_PG, -ratio_PG))
    own_P = batch_mean_terms(torch.where(mask_PG, own_PG, 0.0).sum(1), mask_PG.sum(1))
    # Chosen on the device: which of the two it is need not be known on the host.
    loss_P = torch.where(pairs_P.sum() > 0, batch_mean_terms(pair_sums_P, pairs_P), own_P)
    if kl is not None:
        loss_P = loss_P + kl_weight * kl
    return unpaired_output(loss_P, beta * ratio_PG, reduction, pairs=pairs_P.sum())


def _disco(
    loss: str,
    policy: Tensor,
    desirable: Tensor,
    mask: Tensor | None,
    tau: float,
    kl: Tensor | None,
    kl_weight: float,
    kl_max: float,
    reduction: Reduction,
) -> UnpairedOutput:
    """:func:`disco`, and :func:`discob` for an infinite ``tau``."""
    check_kl(loss, kl, kl_weight)
    check_not_negative(loss, "kl_max", kl_max)
    check_choice(loss, "reduction", reduction, REDUCTIONS)
    policy_PG, mask_PG = prepare_groups(loss, mask, policy=policy)
    check_flags(loss, "desirable", desirable, policy_PG)
    wins_PG, losses_PG = desirable & mask_PG, ~desirable & mask_PG
    kept_P = wins_PG.any(1) & losses_PG.any(1)
    wins_P = masked_mean(torch.where(wins_PG, policy_PG, 0.0), wins_PG)
    if math.isinf(tau):
        losses_P = masked_mean(torch.where(losses_PG, policy_PG, 0.0), losses_PG)
    else:
        # Not -inf: without a wrong response the gradient of the logsumexp would be NaN.
        lowest = torch.finfo(policy_PG.dtype).min
        log_sum_P = (policy_PG / tau).masked_fill(~losses_PG, lowest).logsumexp(1)
        losses_P = tau * (log_sum_P - losses_PG.sum(1).clamp(min=1).to(log_sum_P).log())
    loss_P = torch.where(kept_P, losses_P - wins_P, 0.0)
    if kl is not None:
        strength = kl_weight * (kl.detach() - kl_max).clamp(min=0)
        loss_P = loss_P + strength * kl
    return unpaired_output(loss_P, policy_PG, reduction, kept=kept_P)


def disco(
    policy: Trained,
    desirable: Tensor,
    mask: Tensor | None = None,
    tau: float = 1.0,
    kl: Trained | None = None,
    kl_weight: float = 1e3,
    kl_max: float = 1e-4,
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """Discriminative constrained optimisation: right responses above the hardest wrong ones.

    -mean over prompts of [mean_right s - tau log mean_wrong exp(s / tau)] + sg(max(kl_weight (kl -
    kl_max), 0)) kl, sg stop-gradient  (arXiv:2505.12366, the authors' code, whose reported value
    replaces the log-mean-exp; gradients are the same). The gradient of the last term is that of
    kl_weight / 2 max(kl - kl_max, 0)^2. A prompt with answers of one kind adds 0 and counts.
    :func:`discob` is the limit of large tau.

    Args:
        policy: [P, G] scores s with their gradient: the mean ratio per token,
            ``fastpo.sequence_means((logprobs - old_logprobs).exp(), mask)`` (L-ratio, tau 1), or
            the mean log-prob, ``fastpo.sequence_means(logprobs, mask)`` (log-L, tau 10).
        desirable: [P, G] bool, True for right responses.
        mask: [P, G] bool, True where there is a response; all of them if not given.
        tau: temperature over the wrong responses, > 0.
        kl: 0-d, with its gradient, nats: the mean over tokens of old - policy (``kl``), or of
            ratio - 1 - log ratio (``low_var_kl``); None leaves the term out.
        kl_weight: strength of the constraint, >= 0.
        kl_max: KL that costs nothing, >= 0.
        reduction: ``mean`` over prompts, ``sum`` or ``none``; each prompt carries all of the last
            term.

    Returns:
        UnpairedOutput; the rewards [P, G] are the scores, the metric ``kept`` [P] is True for
        prompts with answers of both kinds.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> right = torch.tensor([[True, False, True, False]])
        >>> out = disco(torch.tensor([[0.99, 0.91, 1.17, 0.90]]), right)
        >>> round(out.loss.item(), 4)
        -0.175
    """
    check_positive("disco", "tau", tau)
    return _disco("disco", policy, desirable, mask, tau, kl, kl_weight, kl_max, reduction)


def discob(
    policy: Trained,
    desirable: Tensor,
    mask: Tensor | None = None,
    kl: Trained | None = None,
    kl_weight: float = 1e3,
    kl_max: float = 1e-4,
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """DisCO-b: :func:`disco` with the plain mean of the wrong responses.

    -mean over prompts of [mean_right s - mean_wrong s], and the term in ``kl``
    (arXiv:2505.12366, the authors' code). With mean log-probs as scores and no KL it is REINFORCE
    with advantages of 1 / n_right and -1 / n_wrong.

    Arguments, result and errors are those of :func:`disco`, less ``tau``.

    Example:
        >>> right = torch.tensor([[True, False, True, False]])
        >>> out = discob(torch.tensor([[0.99, 0.91, 1.17, 0.90]]), right)
        >>> round(out.loss.item(), 4)
        -0.175
    """
    return _disco("discob", policy, desirable, mask, math.inf, kl, kl_weight, kl_max, reduction)


def gepo(
    policy: Trained,
    ref: Tensor,
    desirable: Tensor,
    mask: Tensor | None = None,
    beta: float = 0.1,
    variance_weight: float = 1.0,
    variance_of: Literal["log_ratio", "reward"] = "log_ratio",
    ddof: int = 0,
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """Group equivalent preference optimisation: winners above losers, and winners alike.

    -log sigmoid(beta (mean_w q - mean_l q)) + variance_weight Var_w(q), q = policy - ref
    (arXiv:2505.12723, section 3.2: the variance is of the log-ratios). One winner against one loser
    is DPO. OORL adds 0.01 times this loss to that of REINFORCE++ with rewards of 0 and 1. Prompts
    without both kinds are left out of the mean.

    Args:
        policy: [P, G] summed log-probs of the responses, nats, any float dtype.
        ref: [P, G] the same under the reference model.
        desirable: [P, G] bool, True for winners.
        mask: [P, G] bool, True where there is a response; all of them if not given.
        beta: strength of the tie to the reference, > 0.
        variance_weight: weight of the winners' variance, >= 0.
        variance_of: ``log_ratio``, of q, as in the paper, or ``reward``, of beta q.
        ddof: 0 divides by the number of winners, 1 by one less (a single winner has variance 0).
        reduction: ``mean`` over the prompts that are left, ``sum`` or ``none`` (the others 0).

    Returns:
        UnpairedOutput; the rewards [P, G] are beta q, the metric ``kept`` [P] is True for prompts
        with both kinds.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    The paper does not state the divisor of the variance: ``ddof`` is our choice.

    Example:
        >>> out = gepo(torch.tensor([[2.0, 1.0, 3.0, -1.0, 0.5]]), torch.zeros(1, 5),
        ...            torch.tensor([[True, True, True, False, False]]))
        >>> round(out.loss.item(), 4)
        1.2536
    """
    check_positive("gepo", "beta", beta)
    check_not_negative("gepo", "variance_weight", variance_weight)
    check_choice("gepo", "variance_of", variance_of, ("reward", "log_ratio"))
    if ddof not in (0, 1):
        raise fail("gepo", "ddof", "0 or 1", repr(ddof), "0 is the population's variance.")
    check_choice("gepo", "reduction", reduction, REDUCTIONS)
    policy_PG, ref_PG, mask_PG = prepare_groups("gepo", mask, policy=policy, ref=ref)
    check_flags("gepo", "desirable", desirable, policy_PG)
    ratio_PG = policy_PG - ref_PG.detach()
    wins_PG, losses_PG = desirable & mask_PG, ~desirable & mask_PG
    kept_P = wins_PG.any(1) & losses_PG.any(1)
    wins_P, losses_P = (masked_mean(torch.where(x, ratio_PG, 0.0), x) for x in (wins_PG, losses_PG))
    scale = beta if variance_of == "reward" else 1.0
    centred_PG = torch.where(wins_PG, scale * (ratio_PG - wins_P[:, None]), 0.0)
    variance_P = centred_PG.square().sum(1) / (wins_PG.sum(1) - ddof).clamp(min=1)
    loss_P = -logsigmoid(beta * (wins_P - losses_P)) + variance_weight * variance_P
    return unpaired_output(loss_P, beta * ratio_PG, reduction, kept_P, kept=kept_P)
