"""Losses on the responses that rewards and constraints select from a prompt's samples.

All take summed log-probs per response, in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.inputs import Trained
from fastpo.losses._common import (
    REDUCTIONS,
    LossOutput,
    Reduction,
    UnpairedOutput,
    check_choice,
    check_flags,
    check_not_negative,
    log_ratios,
    mean_logprobs,
    negative_log_likelihood,
    pair_output,
    prepare,
    unpaired_output,
)
from fastpo.losses.margins import soft_logistic


def raft(
    policy: Trained, counts: Tensor, kept: Tensor, reduction: Reduction = "mean"
) -> UnpairedOutput:
    """RAFT: likelihood of the responses that a reward kept.

    -sum of log-probs / sum of tokens over the kept responses (arXiv:2304.06767): the best of K for
    each prompt, or, in LMFlow, the best fifth of all. Each kept response carries its share, so that
    the mean of ``reduction="none"`` is the reduced loss.

    Args:
        policy: [B] summed log-probs of the responses, any float dtype, nats.
        counts: [B] their tokens.
        kept: [B] bool.
        reduction: ``mean``, ``sum`` or ``none``.

    Returns:
        UnpairedOutput; the rewards are mean log-probs per token.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> kept = torch.tensor([True, False, True])
        >>> raft(torch.tensor([-20.0, -9.0, -15.0]), torch.tensor([20, 3, 15]), kept).loss
        tensor(1.)
    """
    check_choice("raft", "reduction", reduction, REDUCTIONS)
    policy_B, counts_B = prepare("raft", policy=policy, counts=counts)
    check_flags("raft", "kept", kept, policy)
    kept_policy_B, kept_counts_B = (
        torch.where(kept, policy_B, 0.0),
        torch.where(kept, counts_B, 0.0),
    )
    loss_B = negative_log_likelihood(kept_policy_B, kept_counts_B, "token_mean")
    return unpaired_output(loss_B, mean_logprobs(policy_B, counts_B), reduction)


def codpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_counts: Tensor,
    beta: float = 0.1,
    sft_weight: float = 5.0,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Calibrated DPO of CGPO: DPO plus likelihood, on pairs that respect the constraints.

    -logsigmoid(beta d) - sft_weight L_chosen / n_chosen  (arXiv:2409.20370): chosen is the best
    response that passes all judges, rejected the worst that fails; prompts where none passes have
    no pair (:func:`fastpo.data.constraints.constrained_pairs`). sft_weight 0 is :func:`dpo`.

    Args:
        chosen_counts: [B] tokens of the chosen responses.
        sft_weight: lambda, >= 0.

    Other arguments, result and errors are those of :func:`dpo`.

    Example:
        >>> out = codpo(*torch.tensor([[-12.0], [-14.5], [-13.0], [-14.0]]), torch.tensor([10]))
        >>> round(out.loss.item(), 4)
        6.621
    """
    check_not_negative("codpo", "sft_weight", sft_weight)
    chosen_B, rejected_B = log_ratios(
        "codpo", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    chosen_B, rejected_B, policy_chosen_B, counts_B = prepare(
        "codpo",
        policy_chosen=chosen_B,
        policy_rejected=rejected_B,
        chosen_logprobs=policy_chosen,
        chosen_counts=chosen_counts,
    )
    preference_B = soft_logistic(beta * (chosen_B - rejected_B))
    loss_B = preference_B - sft_weight * mean_logprobs(policy_chosen_B, counts_B)
    return pair_output(loss_B, beta * chosen_B, beta * rejected_B, reduction)


def crraft(policy: Trained, weights: Tensor, reduction: Reduction = "mean") -> UnpairedOutput:
    """Calibrated RAFT of CGPO: likelihood of each prompt's best response, weighted by its reward.

    -weight L  (arXiv:2409.20370), averaged over the prompts of weight > 0; the selection and its
    weights come from :func:`fastpo.data.constraints.crraft_choice`.

    Args:
        policy: [B] summed log-probs of the selected responses, any float dtype, nats.
        weights: [B] their calibrated rewards, >= 0; 0 leaves a prompt out.
        reduction: ``mean`` over prompts of positive weight, ``sum`` or ``none``.

    Returns:
        UnpairedOutput; the rewards are the weights.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> crraft(torch.tensor([-20.0, -9.0]), torch.tensor([0.5, 0.0])).loss
        tensor(10.)
    """
    check_choice("crraft", "reduction", reduction, REDUCTIONS)
    policy_B, weights_B = prepare("crraft", policy=policy, weights=weights)
    weights_B = weights_B.detach()
    kept_B = weights_B > 0
    loss_B = -weights_B * torch.where(kept_B, policy_B, 0.0)
    return unpaired_output(loss_B, weights_B, reduction, kept_B)
