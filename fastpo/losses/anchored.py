"""Losses over pairs that hold each log-ratio to a level of its own, with a reference model.

Inputs, a, b and d are those of :mod:`fastpo.losses.pairwise`. Unlike the losses of d alone, these
change when a and b move together.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpo.inputs import Trained
from fastpo.losses._common import (
    LossOutput,
    Reduction,
    check_not_negative,
    log_ratios,
    pair_output,
)
from fastpo.losses.margins import soft_logistic, squared


def nca_pair(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.01,
    reduction: Reduction = "mean",
) -> LossOutput:
    """NCA on pairs: noise-contrastive alignment, which keeps the chosen log-prob from falling.

    -logsigmoid(beta a) - (1/2) logsigmoid(-beta a) - (1/2) logsigmoid(-beta b)  (arXiv:2402.05369).
    At the reference it is 2 log 2. Other arguments, result and errors are those of :func:`dpo`.

    Args:
        beta: strength of the tie to the reference, > 0; 0.01 in the paper.

    Example:
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2)]
        >>> round(nca_pair(*sums, beta=0.5).loss.item(), 4)
        1.3046
    """
    chosen_B, rejected_B = log_ratios(
        "nca_pair", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    chosen_rewards_B, rejected_rewards_B = beta * chosen_B, beta * rejected_B
    noise_B = logsigmoid(-chosen_rewards_B) + logsigmoid(-rejected_rewards_B)
    loss_B = -logsigmoid(chosen_rewards_B) - 0.5 * noise_B
    return pair_output(loss_B, chosen_rewards_B, rejected_rewards_B, reduction)


def bco_pair(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.01,
    reduction: Reduction = "mean",
) -> LossOutput:
    """BCO on pairs, without reward shift: each response is classified by its own log-ratio.

    -logsigmoid(beta a) - logsigmoid(-beta b)  (arXiv:2404.04656 with delta = 0), as in the code of
    TRL's DPO trainer; LLaMA-Factory subtracts a running mean of the rewards from both. At the
    reference it is 2 log 2. Other arguments, result and errors are those of :func:`dpo`.

    Args:
        beta: strength of the tie to the reference, > 0; 0.01 in the paper.

    Example:
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2)]
        >>> round(bco_pair(*sums, beta=0.5).loss.item(), 4)
        1.2203
    """
    chosen_B, rejected_B = log_ratios(
        "bco_pair", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    chosen_rewards_B, rejected_rewards_B = beta * chosen_B, beta * rejected_B
    loss_B = soft_logistic(chosen_rewards_B) + soft_logistic(-rejected_rewards_B)
    return pair_output(loss_B, chosen_rewards_B, rejected_rewards_B, reduction)


def sppo_hard(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.001,
    reduction: Reduction = "mean",
) -> LossOutput:
    """SPPO with hard win rates: both log-ratios regress to a level, up and down.

    (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2  (arXiv:2405.00675, eq. 4.7 with win probability 1
    and 0). At the reference it is 1 / (2 beta^2). Other arguments, result and errors are those of
    :func:`dpo`.

    Args:
        beta: 1 / eta of the paper, > 0; 0.001 there, which puts the levels at +-500 nats.

    Example:
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2)]
        >>> round(sppo_hard(*sums, beta=0.5).loss.item(), 4)
        0.89
    """
    chosen_B, rejected_B = log_ratios(
        "sppo_hard", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    level = 1 / (2 * beta)
    loss_B = squared(chosen_B, level) + squared(rejected_B, -level)
    return pair_output(loss_B, beta * chosen_B, beta * rejected_B, reduction)


def apo_zero(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """APO-zero: the chosen log-prob up, the rejected one down.

    1 - sigmoid(beta a) + sigmoid(beta b)  (arXiv:2408.06266, eq. 7), between 0 and 2. For pairs
    whose chosen response is better than what the model writes. Other arguments, result and errors
    are those of :func:`dpo`.

    Example:
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2)]
        >>> round(apo_zero(*sums, beta=0.5).loss.item(), 4)
        0.9128
    """
    chosen_B, rejected_B = log_ratios(
        "apo_zero", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    chosen_rewards_B, rejected_rewards_B = beta * chosen_B, beta * rejected_B
    # sigmoid(-x) for 1 - sigmoid(x): no cancellation where the loss is small.
    loss_B = torch.sigmoid(-chosen_rewards_B) + torch.sigmoid(rejected_rewards_B)
    return pair_output(loss_B, chosen_rewards_B, rejected_rewards_B, reduction)


def apo_down(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """APO-down: both log-probs down, the rejected one further.

    sigmoid(beta a) + 1 - sigmoid(beta d)  (arXiv:2408.06266, eq. 8), between 0 and 2. For pairs
    whose chosen response is worse than what the model writes. Other arguments, result and errors
    are those of :func:`dpo`.

    Example:
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2)]
        >>> round(apo_down(*sums, beta=0.5).loss.item(), 4)
        0.9384
    """
    chosen_B, rejected_B = log_ratios(
        "apo_down", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    loss_B = torch.sigmoid(beta * chosen_B) + torch.sigmoid(-beta * (chosen_B - rejected_B))
    return pair_output(loss_B, beta * chosen_B, beta * rejected_B, reduction)


def cal_dpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    coefficient: float = 0.5,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Cal-DPO: a logistic loss on the log-ratios plus a calibration of each of them.

    -logsigmoid(d) + c [(a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2]  (arXiv:2412.14516). There is
    no beta in the logistic term; the bracket is :func:`sppo_hard`. The authors' code for Zephyr has
    c = 1/2, their code for Pythia (beta 0.1) and a later comparison of losses (arXiv:2502.01237)
    have c = 1. Other arguments, result and errors are those of :func:`dpo`.

    Args:
        beta: sets the levels, +-1 / (2 beta) nats, > 0.
        coefficient: c, >= 0.

    Example:
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2)]
        >>> round(cal_dpo(*sums, beta=0.5).loss.item(), 4)
        0.8482
    """
    check_not_negative("cal_dpo", "coefficient", coefficient)
    chosen_B, rejected_B = log_ratios(
        "cal_dpo", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    level = 1 / (2 * beta)
    calibration_B = squared(chosen_B, level) + squared(rejected_B, -level)
    loss_B = soft_logistic(chosen_B - rejected_B) + coefficient * calibration_B
    return pair_output(loss_B, beta * chosen_B, beta * rejected_B, reduction)
