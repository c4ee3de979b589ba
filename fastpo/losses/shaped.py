"""DPO with another shape: lengths, penalties, a beta per side, a discovered curve.

Inputs, a, b and d are those of :mod:`fastpo.losses.pairwise`; n are token counts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from fastpo.inputs import Trained
from fastpo.losses._common import (
    LossOutput,
    Reduction,
    check_finite,
    check_not_negative,
    check_positive,
    log_ratios,
    mean_logprobs,
    pair_output,
    prepare,
)
from fastpo.losses.margins import soft_logistic


def discopop(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.05,
    tau: float = 0.05,
    reduction: Reduction = "mean",
) -> LossOutput:
    """DiscoPOP: logistic loss where the pair is wrong, exponential loss where it is right.

    (1 - m) (-logsigmoid(z)) + m exp(-z) with z = beta d, m = sigmoid(z / tau)  (arXiv:2406.08414,
    eq. 5). Not convex; m carries a gradient. Other arguments, result and errors are those of
    :func:`dpo`.

    Args:
        tau: width of the passage between the two parts, > 0. From 1 on the exponential part is not
            held back where the pair is wrong, and grows without bound there.

    Example:
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2)]
        >>> round(discopop(*sums, beta=0.5).loss.item(), 4)
        0.7045
    """
    check_positive("discopop", "tau", tau)
    chosen_B, rejected_B = log_ratios(
        "discopop", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    margin_B = beta * (chosen_B - rejected_B)
    # m exp(-z) as one exponential: where the pair is wrong it would be 0 * inf.
    exponential_B = torch.exp(logsigmoid(margin_B / tau) - margin_B)
    loss_B = torch.sigmoid(-margin_B / tau) * -logsigmoid(margin_B) + exponential_B
    return pair_output(loss_B, beta * chosen_B, beta * rejected_B, reduction)


def sigmoid_norm(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_counts: Tensor,
    rejected_counts: Tensor,
    beta: float = 5.0,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Length-normalised DPO: the log-ratios are means over tokens.

    -logsigmoid(beta (a / n_chosen - b / n_rejected))  (Tulu 3, arXiv:2411.15124), TRL's loss type
    of this name. With a reference of one log-prob per token everywhere it is SimPO without margin.
    The rewards are beta a / n and beta b / n; TRL reports beta a and beta b. Other arguments,
    result and errors are those of :func:`dpo`.

    Args:
        chosen_counts: [B] tokens of the chosen responses.
        rejected_counts: [B] tokens of the rejected responses.
        beta: strength of the tie to the reference, > 0; larger than DPO's, as the margin is per
            token.

    Example:
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2)]
        >>> counts = torch.tensor([3]), torch.tensor([2])
        >>> round(sigmoid_norm(*sums, *counts, beta=0.5).loss.item(), 4)
        0.6171
    """
    chosen_B, rejected_B = log_ratios(
        "sigmoid_norm", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    chosen_B, rejected_B, *counts_B = prepare(
        "sigmoid_norm",
        policy_chosen=chosen_B,
        policy_rejected=rejected_B,
        chosen_counts=chosen_counts,
        rejected_counts=rejected_counts,
    )
    chosen_rewards_B = beta * mean_logprobs(chosen_B, counts_B[0])
    rejected_rewards_B = beta * mean_logprobs(rejected_B, counts_B[1])
    loss_B = soft_logistic(chosen_rewards_B - rejected_rewards_B)
    return pair_output(loss_B, chosen_rewards_B, rejected_rewards_B, reduction)


def dpop(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.3,
    penalty: float = 50.0,
    reduction: Reduction = "mean",
) -> LossOutput:
    """DPO-positive (Smaug): DPO with a penalty once the chosen log-prob falls below the reference.

    -logsigmoid(beta (d - lambda max(0, -a)))  (arXiv:2402.13228): the penalty lies inside the
    sigmoid. Public variants that subtract it from the loss or add it outside are other losses.
    Other arguments, result and errors are those of :func:`dpo`.

    Args:
        penalty: lambda, >= 0; 0 is :func:`dpo`.

    Example:
        >>> sums = [torch.tensor([x]) for x in (-1.5, -4.4, -1.1, -3.9)]
        >>> round(dpop(*sums, beta=0.5, penalty=5).loss.item(), 4)
        1.277

    Experimental: the formula was read in restatements, not in the paper or its authors' code.
    """
    check_not_negative("dpop", "penalty", penalty)
    chosen_B, rejected_B = log_ratios(
        "dpop", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    loss_B = soft_logistic(beta * (chosen_B - rejected_B - penalty * relu(-chosen_B)))
    return pair_output(loss_B, beta * chosen_B, beta * rejected_B, reduction)


def r_dpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_counts: Tensor,
    rejected_counts: Tensor,
    alpha: float,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """R-DPO: DPO on a reward that is penalised for length.

    -logsigmoid(beta d + alpha (n_chosen - n_rejected))  (arXiv:2403.19159). The reward less
    alpha n is what is maximised, so r = beta log-ratio + alpha n: a longer chosen response has part
    of its margin for free and is pushed less. Public code has both signs; here alpha > 0 penalises
    length. The rewards are beta a and beta b, without alpha n. Other arguments, result and errors
    are those of :func:`dpo`.

    Args:
        chosen_counts: [B] tokens of the chosen responses.
        rejected_counts: [B] tokens of the rejected responses.
        alpha: penalty per token, on the scale of the rewards; any sign, 0 is :func:`dpo`.

    Example:
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2)]
        >>> out = r_dpo(*sums, torch.tensor([3]), torch.tensor([2]), alpha=0.02, beta=0.5)
        >>> round(out.loss.item(), 4)
        0.5252

    Experimental: the sign was derived and found in one other paper's table, not read in this one.
    """
    check_finite("r_dpo", "alpha", alpha)
    chosen_B, rejected_B = log_ratios(
        "r_dpo", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    chosen_B, rejected_B, *counts_B = prepare(
        "r_dpo",
        policy_chosen=chosen_B,
        policy_rejected=rejected_B,
        chosen_counts=chosen_counts,
        rejected_counts=rejected_counts,
    )
    loss_B = soft_logistic(beta * (chosen_B - rejected_B) + alpha * (counts_B[0] - counts_B[1]))
    return pair_output(loss_B, beta * chosen_B, beta * rejected_B, reduction)


def flex_dpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta_rejected: float,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Flex-DPO: a beta for each side, so that the rejected response is pushed less.

    -logsigmoid(beta+ a - beta- b)  (3D-Properties, arXiv:2406.07327). The metric
    ``log_gradient_ratio`` [B] is log(|dL/dp_rejected| / |dL/dp_chosen|) in probability space,
    S_chosen - S_rejected + log(beta- / beta+): the paper's measure of how much faster a rejected
    response vanishes than a chosen one grows. Other arguments, result and errors are those of
    :func:`dpo`.

    Args:
        beta_rejected: beta-, > 0, below ``beta`` in the paper, where about 0.08 is the best at a
            beta+ of 0.1; equal betas are :func:`dpo`.
        beta: beta+, of the chosen response, > 0.

    Returns:
        LossOutput; the rewards are beta+ a and beta- b.

    Example:
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2)]
        >>> round(flex_dpo(*sums, beta=0.5, beta_rejected=0.2).loss.item(), 4)
        0.5981

    Experimental: formula and values were read in referees' summaries; the paper came without code.
    """
    check_positive("flex_dpo", "beta_rejected", beta_rejected)
    chosen_B, rejected_B = log_ratios(
        "flex_dpo", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    chosen_rewards_B, rejected_rewards_B = beta * chosen_B, beta_rejected * rejected_B
    loss_B = soft_logistic(chosen_rewards_B - rejected_rewards_B)
    ratio_B = policy_chosen.to(loss_B) - policy_rejected.to(loss_B)
    ratio_B = ratio_B + math.log(beta_rejected / beta)
    return pair_output(
        loss_B, chosen_rewards_B, rejected_rewards_B, reduction, log_gradient_ratio=ratio_B
    )
