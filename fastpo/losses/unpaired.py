"""Losses over single responses that are labelled desirable or undesirable.

All take summed log-probs per response, in nats, prompt and padding left out. The reference never
gets a gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpo.checks import check_tensors
from fastpo.inputs import Trained
from fastpo.losses._common import (
    REDUCTIONS,
    Reduction,
    UnpairedOutput,
    check_choice,
    check_finite,
    check_flags,
    check_not_negative,
    check_positive,
    fail,
    prepare,
    unpaired_output,
)
from fastpo.losses.margins import soft_logistic


def _check_options(
    loss: str,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    reduction: Reduction,
) -> None:
    """Options that the losses of this module share."""
    check_positive(loss, "beta", beta)
    check_not_negative(loss, "desirable_weight", desirable_weight)
    check_not_negative(loss, "undesirable_weight", undesirable_weight)
    check_choice(loss, "reduction", reduction, REDUCTIONS)


def _responses(loss: str, policy: Tensor, ref: Tensor, desirable: Tensor) -> list[Tensor]:
    """Checked log-probs [B] of policy and reference, whose labels are bool [B]."""
    statistics = prepare(loss, policy=policy, ref=ref)
    check_flags(loss, "desirable", desirable, policy)
    return statistics


def _number(loss: str, argument: str, value: Tensor | float, like: Tensor) -> Tensor | float:
    """A finite number, or a tensor of one element, detached and without shape."""
    if not isinstance(value, Tensor):
        check_finite(loss, argument, value)
        return value
    if value.numel() != 1:
        remedy = "Average it over the batch and over ranks."
        raise fail(loss, argument, "a tensor of one element", f"shape {list(value.shape)}", remedy)
    return value.detach().to(like).reshape(())


def kto(
    policy: Trained,
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
    _check_options("kto", beta, desirable_weight, undesirable_weight, reduction)
    policy_B, ref_B = _responses("kto", policy, ref, desirable)
    kl = _number("kto", "kl", kl, policy_B)
    kl = kl.clamp(min=0) if isinstance(kl, Tensor) else max(kl, 0.0)

    log_ratio_B = policy_B - ref_B.detach()
    value_B = beta * (log_ratio_B - kl)
    # sigmoid(-x) for 1 - sigmoid(x): no cancellation where the loss is small.
    loss_B = torch.where(
        desirable,
        desirable_weight * torch.sigmoid(-value_B),
        undesirable_weight * torch.sigmoid(value_B),
    )
    return unpaired_output(loss_B, beta * log_ratio_B, reduction)


def apo_zero_unpaired(
    policy: Trained,
    ref: Tensor,
    desirable: Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """APO-zero on single responses: KTO with its reference point at zero.

    weight (1 - sigmoid(beta r)) for desirable responses, weight sigmoid(beta r) for undesirable
    ones, with r = policy - ref  (the unpaired form of arXiv:2408.06266, eq. 7, in TRL's KTO
    trainer).

    Args:
        policy: [B] summed log-probs of the responses, any float dtype, nats.
        ref: [B] the same under the reference model.
        desirable: [B] bool labels.
        beta: strength of the tie to the reference, > 0.
        desirable_weight: weight of desirable responses, >= 0.
        undesirable_weight: weight of undesirable responses, >= 0.
        reduction: ``mean`` over responses, ``sum`` or ``none``.

    Result and errors are those of :func:`kto`.

    Example:
        >>> out = apo_zero_unpaired(torch.tensor([-2.5, -2.7]), torch.tensor([-2.7, -2.2]),
        ...                         torch.tensor([True, False]), beta=0.5, reduction="none")
        >>> [round(x, 4) for x in out.loss.tolist()]
        [0.475, 0.4378]
    """
    name = "apo_zero_unpaired"
    _check_options(name, beta, desirable_weight, undesirable_weight, reduction)
    policy_B, ref_B = _responses(name, policy, ref, desirable)
    reward_B = beta * (policy_B - ref_B.detach())
    loss_B = torch.where(
        desirable,
        desirable_weight * torch.sigmoid(-reward_B),
        undesirable_weight * torch.sigmoid(reward_B),
    )
    return unpaired_output(loss_B, reward_B, reduction)


def udm_weights(desirable_probability: Tensor, low: float = 0.5, high: float = 10.0) -> Tensor:
    """Weights of undesirable responses that match their prompts to those of the desirable ones.

    p / (1 - p), held in [low, high], for the probability p, by a classifier of prompt embeddings,
    that a prompt is from the desirable set: the density ratio of BCO (arXiv:2404.04656, section
    on underlying distribution matching). No gradient.

    Args:
        desirable_probability: [B] p in [0, 1].
        low: smallest weight, > 0.
        high: largest weight, >= low.

    Returns:
        [B] weights for :func:`bco`.

    Raises:
        ValueError: the bounds are not in order.

    Example:
        >>> udm_weights(torch.tensor([0.1, 0.75, 1.0]))
        tensor([ 0.5000,  3.0000, 10.0000])
    """
    check_tensors("losses.udm_weights", desirable_probability=desirable_probability)
    if not 0 < low <= high < math.inf:
        remedy = "The published bounds are 0.5 and 10."
        raise fail("udm_weights", "low, high", "0 < low <= high", f"{low!r}, {high!r}", remedy)
    (probability_B,) = prepare("udm_weights", desirable_probability=desirable_probability.detach())
    return (probability_B / (1 - probability_B + 1e-8)).clamp(low, high)


def bco(
    policy: Trained,
    ref: Tensor,
    desirable: Tensor,
    delta: Tensor | float,
    beta: float = 0.1,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """Binary classifier optimisation: each response is classified by its reward, with a shift.

    -logsigmoid(r - delta) for desirable responses, -weight logsigmoid(-(r - delta)) for undesirable
    ones, with r = beta (policy - ref)  (arXiv:2404.04656). delta is the running mean of the
    rewards, :class:`BCODelta`, updated before use. The mean is over all responses, as in TRL's
    former trainer; LLaMA-Factory adds up the two responses of a pair, which is twice the mean of as
    many desirable as undesirable ones.

    Args:
        policy: [B] summed log-probs of the responses, any float dtype, nats.
        ref: [B] the same under the reference model.
        desirable: [B] bool labels.
        delta: the shift, a number or a tensor of one element; no gradient.
        beta: strength of the tie to the reference, > 0.
        weights: [B] weights that apply to undesirable responses alone, see :func:`udm_weights`.
        reduction: ``mean`` over responses, ``sum`` or ``none``.

    Result and errors are those of :func:`kto`.

    Example:
        >>> out = bco(torch.tensor([-2.5, -2.7]), torch.tensor([-2.7, -2.2]),
        ...           torch.tensor([True, False]), delta=-0.075, beta=0.5, reduction="none")
        >>> [round(x, 4) for x in out.loss.tolist()]
        [0.6095, 0.6095]
    """
    check_positive("bco", "beta", beta)
    check_choice("bco", "reduction", reduction, REDUCTIONS)
    policy_B, ref_B = _responses("bco", policy, ref, desirable)
    delta = _number("bco", "delta", delta, policy_B)
    reward_B = beta * (policy_B - ref_B.detach())
    shifted_B = reward_B - delta
    loss_B = soft_logistic(torch.where(desirable, shifted_B, -shifted_B))
    if weights is not None:
        _, weights_B = prepare("bco", policy=policy_B, weights=weights.detach())
        loss_B = torch.where(desirable, loss_B, weights_B * loss_B)
    return unpaired_output(loss_B, reward_B, reduction)
