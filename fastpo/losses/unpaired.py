"""Losses over single responses that are labelled desirable or undesirable.

All take summed log-probs per response, in nats, prompt and padding left out. The reference never
gets a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.losses._common import (
    REDUCTIONS,
    Reduction,
    UnpairedOutput,
    check_choice,
    check_finite,
    check_not_negative,
    check_positive,
    fail,
    prepare,
    reduce,
)


def kto(
    policy: Tensor,
    ref: Tensor,
    desirable: Tensor,
    kl: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """KTO: prospect-theoretic value of each response around a reference point.

    weight (1 - sigmoid(beta (r - z0))) for desirable responses, weight (1 - sigmoid(beta (z0 - r)))
    for undesirable ones, with r = policy - ref and z0 = max(kl, 0), detached  (arXiv:2402.01306,
    eq. 7). The mean is over all responses; batches with one label alone are legal.

    Args:
        policy: [B] summed log-probs of the responses, any float dtype, nats.
        ref: [B] the same under the reference model.
        desirable: [B] bool labels.
        kl: estimate of KL(policy || reference) in nats, a number or a tensor of one element: the
            mean of policy - ref over responses put to the wrong prompts, averaged over ranks before
            it comes here (its clamp at 0 does not commute with averaging).
        beta: strength of the tie to the reference, > 0.
        desirable_weight: weight of desirable responses, >= 0.
        undesirable_weight: weight of undesirable responses, >= 0.
        reduction: ``mean`` over responses, ``sum`` or ``none``.

    Returns:
        UnpairedOutput; the rewards are beta r.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> out = kto(torch.tensor([-2.5, -2.7]), torch.tensor([-2.7, -2.2]),
        ...           torch.tensor([True, False]), kl=0.2, beta=0.5, reduction="none")
        >>> [round(x, 4) for x in out.loss.tolist()]
        [0.5, 0.4134]
    """
    check_positive("kto", "beta", beta)
    check_not_negative("kto", "desirable_weight", desirable_weight)
    check_not_negative("kto", "undesirable_weight", undesirable_weight)
    check_choice("kto", "reduction", reduction, REDUCTIONS)
    policy_B, ref_B = prepare("kto", policy=policy, ref=ref)
    if desirable.dtype != torch.bool or desirable.shape != policy.shape:
        got = f"{desirable.dtype} {list(desirable.shape)}"
        remedy = "Compare labels with 0 or 1 to get bool, one per response."
        raise fail("kto", "desirable", f"torch.bool {list(policy.shape)}", got, remedy)
    if isinstance(kl, Tensor):
        if kl.numel() != 1:
            remedy = "Average it over the batch and over ranks."
            raise fail("kto", "kl", "a tensor of one element", f"shape {list(kl.shape)}", remedy)
        kl = kl.detach().to(policy_B).reshape(()).clamp(min=0)
    else:
        check_finite("kto", "kl", kl)
        kl = max(kl, 0.0)

    log_ratio_B = policy_B - ref_B.detach()
    value_B = beta * (log_ratio_B - kl)
    # sigmoid(-x) for 1 - sigmoid(x): no cancellation where the loss is small.
    loss_B = torch.where(
        desirable,
        desirable_weight * torch.sigmoid(-value_B),
        undesirable_weight * torch.sigmoid(value_B),
    )
    return UnpairedOutput(reduce(loss_B, reduction), beta * log_ratio_B.detach())
