"""f-DPO: other divergences from the reference than the reverse KL, as a transform of log-ratios.

The transform comes before the loss: a loss of the difference of log-ratios gets scores in the
place of the policy's log-probs and zeros in the place of the reference's.

>>> from fastpo.losses import f_divergence_score, hinge
>>> chosen, rejected = torch.tensor([0.2]), torch.tensor([-0.5])
>>> scores = [f_divergence_score(x, "js_divergence") for x in (chosen, rejected)]
>>> round(hinge(*scores, torch.zeros(1), torch.zeros(1), beta=0.5).loss.item(), 4)
0.812
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpo.bounds import hold
from fastpo.checks import check_tensors
from fastpo.inputs import Is, Trained
from fastpo.losses._common import (
    LARGEST_EXPONENT,
    LossOutput,
    Reduction,
    check_choice,
    check_finite,
    log_ratios,
    pair_output,
)
from fastpo.losses.margins import soft_logistic

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def f_divergence_score(
    log_ratio: Tensor, divergence: Divergence = "reverse_kl", alpha: float = 0.5
) -> Tensor:
    """f'(exp r) of log-ratios r, the implicit reward over beta under an f-divergence.

    reverse_kl: r;  forward_kl: 1 - exp(-r);  js_divergence: log 2 + logsigmoid(r);
    alpha_divergence: (exp((alpha - 1) r) - 1) / (alpha - 1), r at alpha = 1
    (arXiv:2309.16240, with the names and constants of TRL's DPO trainer). All are 0 at r = 0.
    js_divergence is that of twice the Jensen-Shannon divergence of fastpo.linear_divergence.

    The paper's alpha is 1 - alpha of TRL and here; the two agree at 0.5 alone.

    What it may be used for: the term beta log Z of the paper's reparameterisation cancels only in
    the difference of two rewards. TRL therefore admits it for dpo, sigmoid_norm, hinge, ipo
    (averaged), exo_pair, robust and discopop (and for sft, which it leaves alone) and refuses it
    for nca_pair, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero and apo_down.

    Args:
        log_ratio: policy minus reference log-prob of responses, any shape, nats; the caller
            detaches the reference.
        divergence: its name.
        alpha: of alpha_divergence, else unused.

    Returns:
        The scores, float32, or float64 for float64. Exponents end at 80 (700 in float64): beyond,
        the score is constant and its gradient 0.

    Raises:
        ValueError: an unknown name, or an alpha that is not finite.

    Example:
        >>> f_divergence_score(torch.tensor([0.2, -0.5]), "forward_kl")
        tensor([ 0.1813, -0.6487])
    """
    check_tensors("losses.f_divergence_score", log_ratio=log_ratio)
    check_choice("f_divergence_score", "divergence", divergence, DIVERGENCES)
    check_finite("f_divergence_score", "alpha", alpha)
    log_ratio = log_ratio.to(torch.promote_types(log_ratio.dtype, torch.float32))
    if divergence == "js_divergence":
        return math.log(2) + logsigmoid(log_ratio)
    # forward_kl is the alpha-divergence of alpha 0, reverse_kl that of alpha 1.
    power = {"reverse_kl": 0.0, "forward_kl": -1.0}.get(divergence, alpha - 1)
    if power == 0:
        return log_ratio
    exponent = hold(power * log_ratio, high=LARGEST_EXPONENT[log_ratio.dtype])
    return torch.expm1(exponent) / power


def f_dpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    divergence: Annotated[Divergence, Is("reverse_kl", "dpo")] = "reverse_kl",
    alpha: float = 0.5,
    reduction: Reduction = "mean",
) -> LossOutput:
    """f-DPO: DPO with another divergence between policy and reference.

    -logsigmoid(beta (f'(exp a) - f'(exp b)))  (arXiv:2309.16240); for f' see
    :func:`f_divergence_score`, which serves the other losses of a difference. ``reverse_kl`` is
    :func:`dpo`. The rewards are beta f'(exp a) and beta f'(exp b), what the loss compares; TRL
    reports beta a and beta b. Other arguments and errors are those of :func:`dpo`.

    Args:
        divergence: its name.
        alpha: of alpha_divergence, 1 minus the paper's; else unused.

    Example:
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2)]
        >>> round(f_dpo(*sums, beta=0.5, divergence="forward_kl").loss.item(), 4)
        0.507
    """
    chosen_B, rejected_B = log_ratios(
        "f_dpo", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    chosen_rewards_B = beta * f_divergence_score(chosen_B, divergence, alpha)
    rejected_rewards_B = beta * f_divergence_score(rejected_B, divergence, alpha)
    loss_B = soft_logistic(chosen_rewards_B - rejected_rewards_B)
    return pair_output(loss_B, chosen_rewards_B, rejected_rewards_B, reduction)
