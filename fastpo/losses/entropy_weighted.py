"""POWER: logistic losses from a weighted entropy, without a reference model.

Log-probs are summed per response, in nats. The weight of a response is one over its token count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.checks import check_tensors
from fastpo.inputs import Trained
from fastpo.losses._common import (
    REDUCTIONS,
    LossOutput,
    Reduction,
    check_choice,
    check_not_negative,
    check_positive,
    mean_logprobs,
    pair_output,
    prepare,
)
from fastpo.losses.margins import soft_logistic


def _power(
    loss: str,
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    chosen_counts: Tensor,
    rejected_counts: Tensor,
    label: Tensor | None,
    beta: float,
    eta: float,
    reduction: Reduction,
) -> LossOutput:
    check_positive(loss, "beta", beta)
    check_not_negative(loss, "eta", eta)
    check_choice(loss, "reduction", reduction, REDUCTIONS)
    chosen_B, rejected_B, chosen_counts_B, rejected_counts_B, label_B = prepare(
        loss,
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        chosen_counts=chosen_counts,
        rejected_counts=rejected_counts,
        label=torch.ones_like(chosen_counts) if label is None else label,
    )
    # beta w (L + 1): the reward whose weighted-entropy optimum is the policy.
    chosen_rewards_B = beta * mean_logprobs(chosen_B + 1, chosen_counts_B)
    rejected_rewards_B = beta * mean_logprobs(rejected_B + 1, rejected_counts_B)
    margin_B = chosen_rewards_B - rejected_rewards_B
    likelihood_B = eta * beta * mean_logprobs(chosen_B, chosen_counts_B)
    loss_B = soft_logistic(margin_B, label_B) - likelihood_B
    win_rates_B = torch.sigmoid(margin_B)
    return pair_output(
        loss_B, chosen_rewards_B, rejected_rewards_B, reduction, win_rates=win_rates_B
    )


def power(
    policy_chosen: Trained,
    policy_rejected: Trained,
    chosen_counts: Tensor,
    rejected_counts: Tensor,
    beta: float = 2.0,
    eta: float = 0.005,
    reduction: Reduction = "mean",
) -> LossOutput:
    """POWER: preference optimisation with a length-weighted entropy.

    -logsigmoid(z) - eta beta w_c L_c,  z = beta (w_c L_c - w_r L_r + w_c - w_r), with L the
    summed log-prob and w = 1 / tokens of chosen (c) and rejected (r)  (arXiv:2412.09544). The
    policy of largest E[reward] + beta H_w, H_w = -sum w p log p, has reward = beta w (log p + 1)
    + const: hence the constants w in z. Without them and with eta = 0 it is :func:`simpo` with
    gamma 0.

    Args:
        chosen_counts: [B] tokens of the chosen responses.
        rejected_counts: [B] tokens of the rejected responses.
        beta: weight of the entropy, > 0.
        eta: weight of the likelihood of the chosen response, >= 0.

    Other arguments and errors are those of :func:`dpo`.

    Returns:
        LossOutput; the rewards are beta w (L + 1), the metric ``win_rates`` [B] is sigmoid(z).

    Experimental: the entropy part is derived, the likelihood term and the values of beta and eta
    are from memory.

    Example:
        >>> sums, counts = torch.tensor([[-12.0], [-14.5]]), torch.tensor([[10], [12]])
        >>> round(power(*sums, *counts).loss.item(), 4)
        0.6805
    """
    check_tensors("losses.power", chosen_counts=chosen_counts)
    sums, counts = (policy_chosen, policy_rejected), (chosen_counts, rejected_counts)
    return _power("power", *sums, *counts, None, beta, eta, reduction)


def power_dl(
    policy_chosen: Trained,
    policy_rejected: Trained,
    chosen_counts: Tensor,
    rejected_counts: Tensor,
    label: Tensor,
    beta: float = 2.0,
    eta: float = 0.005,
    reduction: Reduction = "mean",
) -> LossOutput:
    """POWER with dynamic labels: labels that drift to what the policy believes.

    -q logsigmoid(z) - (1 - q) logsigmoid(-z) - eta beta w_c L_c, with z of :func:`power`
    (arXiv:2412.09544). Labels start at 1 and follow q <- (1 - gamma) q + gamma sigmoid(z); they are
    kept by pair, outside of this function. At q = sigmoid(z) and eta = 0 a pair has no gradient.

    Args:
        chosen_counts: [B] tokens of the chosen responses.
        rejected_counts: [B] tokens of the rejected responses.
        label: [B] q as of now, in [0, 1].
        beta: weight of the entropy, > 0.
        eta: weight of the likelihood of the chosen response, >= 0.

    Other arguments and errors are those of :func:`dpo`.

    Returns:
        LossOutput; the rewards are beta w (L + 1), the metric ``win_rates`` [B] is sigmoid(z), the
        target of the label's update.

    Experimental: as :func:`power`; the label's schedule is from memory.

    Example:
        >>> sums, counts = torch.tensor([[-12.0], [-14.5]]), torch.tensor([[10], [12]])
        >>> before = power_dl(*sums, *counts, label=torch.ones(1))
        >>> label = 0.9 * torch.ones(1) + 0.1 * before.metrics["win_rates"]
        >>> round(power_dl(*sums, *counts, label=label).loss.item(), 4)
        0.6829
    """
    check_tensors("losses.power_dl", label=label)
    sums, counts = (policy_chosen, policy_rejected), (chosen_counts, rejected_counts)
    return _power("power_dl", *sums, *counts, label, beta, eta, reduction)
