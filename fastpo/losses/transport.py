"""Losses over the distribution of margins of a batch, with a reference model.

Pairs of one batch are coupled by sorting: the local batch, so the loss depends on how pairs are
spread over batches and ranks. Inputs, a and b are those of :mod:`fastpo.losses.pairwise`.
"""

from __future__ import annotations

from torch import Tensor

from fastpo.inputs import Trained
from fastpo.losses._common import (
    REDUCTIONS,
    LossOutput,
    Reduction,
    check_choice,
    check_label_smoothing,
    check_positive,
    log_ratios,
    pair_output,
    prepare,
)
from fastpo.losses.margins import soft_logistic


def aot(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> LossOutput:
    """AOT for pairs: the policy's margins shall dominate the reference's, rank by rank.

    With the margins of the batch sorted in each model, u_i = (S_chosen - S_rejected)_(i) -
    (R_chosen - R_rejected)_(i);  -(1 - e) logsigmoid(beta u) - e logsigmoid(-beta u)
    (arXiv:2406.05882, as in TRL's DPO trainer). The gradient goes through the sort. With one pair
    it is :func:`dpo`. With ``reduction="none"`` the losses are by rank, not by pair. Other
    arguments, result and errors are those of :func:`dpo`.

    Example:
        >>> policy, ref, zero = torch.tensor([0.2, -1.0]), torch.tensor([0.5, 0.3]), torch.zeros(2)
        >>> round(aot(policy, zero, ref, zero, beta=0.5).loss.item(), 4)
        0.9205
    """
    check_positive("aot", "beta", beta)
    check_label_smoothing("aot", label_smoothing)
    check_choice("aot", "reduction", reduction, REDUCTIONS)
    chosen_B, rejected_B, ref_chosen_B, ref_rejected_B = prepare(
        "aot",
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
    )
    ref_chosen_B, ref_rejected_B = ref_chosen_B.detach(), ref_rejected_B.detach()
    policy_margin_B = (chosen_B - rejected_B).sort(stable=True).values
    ref_margin_B = (ref_chosen_B - ref_rejected_B).sort(stable=True).values
    loss_B = soft_logistic(beta * (policy_margin_B - ref_margin_B), 1 - label_smoothing)
    rewards = beta * (chosen_B - ref_chosen_B), beta * (rejected_B - ref_rejected_B)
    return pair_output(loss_B, *rewards, reduction)


def aot_unpaired(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> LossOutput:
    """AOT for unpaired data: log-ratios of chosen shall dominate those of rejected, rank by rank.

    With the log-ratios of the batch sorted on each side, u_i = a_(i) - b_(i);
    -(1 - e) logsigmoid(beta u) - e logsigmoid(-beta u)  (arXiv:2406.05882, as in TRL's DPO
    trainer). Chosen and rejected of one place need not share a prompt, but there must be as many of
    each. The gradient goes through the sort. With ``reduction="none"`` the losses are by rank.
    Other arguments, result and errors are those of :func:`dpo`.

    Example:
        >>> chosen, rejected = torch.tensor([0.2, 0.1]), torch.tensor([-0.5, 0.2])
        >>> out = aot_unpaired(chosen, rejected, torch.zeros(2), torch.zeros(2), beta=0.5)
        >>> round(out.loss.item(), 4)
        0.6238
    """
    check_label_smoothing("aot_unpaired", label_smoothing)
    chosen_B, rejected_B = log_ratios(
        "aot_unpaired", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    margin_B = chosen_B.sort(stable=True).values - rejected_B.sort(stable=True).values
    loss_B = soft_logistic(beta * margin_B, 1 - label_smoothing)
    return pair_output(loss_B, beta * chosen_B, beta * rejected_B, reduction)
