"""Losses over pairs that model wrong labels or soft targets, with a reference model.

Inputs, a, b and d are those of :mod:`fastpo.losses.pairwise`. Conservative DPO is :func:`dpo` with
label smoothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpo.inputs import Trained
from fastpo.losses._common import (
    LossOutput,
    Reduction,
    check_label_smoothing,
    fail,
    log_ratios,
    pair_output,
)
from fastpo.losses.margins import soft_logistic


def robust(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Robust DPO: the unbiased estimate of the DPO loss under flipped labels.

    [-(1 - e) logsigmoid(beta d) + e logsigmoid(-beta d)] / (1 - 2 e)  (arXiv:2403.00409). Its
    expectation over labels flipped at rate e is :func:`dpo` on the true labels. It has no lower
    bound: far beyond the true margin the loss falls by e / (1 - 2 e) per unit of beta d. (Smoothed
    :func:`dpo` has the opposite sign in the second term and a minimum.) Other arguments, result and
    errors are those of :func:`dpo`.

    Args:
        label_smoothing: e, share of flipped labels, in [0, 0.5); 0 is :func:`dpo`.

    Example:
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2)]
        >>> round(robust(*sums, beta=0.5, label_smoothing=0.1).loss.item(), 4)
        0.4896
    """
    check_label_smoothing("robust", label_smoothing)
    chosen_B, rejected_B = log_ratios(
        "robust", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    # By logsigmoid(-z) = logsigmoid(z) - z this is a soft label above 1.
    label = (1 - label_smoothing) / (1 - 2 * label_smoothing)
    loss_B = soft_logistic(beta * (chosen_B - rejected_B), label)
    return pair_output(loss_B, beta * chosen_B, beta * rejected_B, reduction)


def exo_pair(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
    reduction: Reduction = "mean",
) -> LossOutput:
    """EXO on pairs: reverse KL from the policy's preference to the smoothed label.

    With z = beta d and s = sigmoid, s(z) [log s(z) - log(1 - e)] + s(-z) [log s(-z) - log e]
    (arXiv:2402.00856, eq. 16). The minimum is 0, at s(beta d) = 1 - e; the gradient goes through
    all four factors. Other arguments, result and errors are those of :func:`dpo`.

    Args:
        label_smoothing: e, target probability of the rejected response, in (0, 0.5). The loss
            diverges as e goes to 0.

    Example:
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2)]
        >>> round(exo_pair(*sums, beta=0.5).loss.item(), 4)
        2.1781
    """
    check_label_smoothing("exo_pair", label_smoothing)
    if label_smoothing == 0:
        remedy = "The paper recommends 1e-3."
        raise fail("exo_pair", "label_smoothing", "a number in (0, 0.5)", "0", remedy)
    chosen_B, rejected_B = log_ratios(
        "exo_pair", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    margin_B = beta * (chosen_B - rejected_B)
    won_B = torch.sigmoid(margin_B) * (logsigmoid(margin_B) - math.log1p(-label_smoothing))
    lost_B = torch.sigmoid(-margin_B) * (logsigmoid(-margin_B) - math.log(label_smoothing))
    return pair_output(won_B + lost_B, beta * chosen_B, beta * rejected_B, reduction)
