"""Losses over single samples that are labelled desirable or undesirable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpo.bounds import hold
from fastpo.diffusion.losses._common import check_scale, prepare_errors
from fastpo.losses._common import (
    LARGEST_EXPONENT,
    REDUCTIONS,
    Reduction,
    UnpairedOutput,
    check_choice,
    check_flags,
    check_not_negative,
    unpaired_output,
)

Value = Literal["sigmoid", "loss_averse", "risk_seeking_1", "risk_seeking_2", "risk_seeking_3"]
VALUES = ("sigmoid", "loss_averse", "risk_seeking_1", "risk_seeking_2", "risk_seeking_3")


def _shortfall(value: Value, gain_B: Tensor, sign_B: Tensor) -> Tensor:
    """1 - h of gains beta g' and signs +-1, without the difference of near numbers."""
    signed_B = sign_B * gain_B
    if value == "sigmoid":
        return torch.sigmoid(-signed_B)
    if value == "loss_averse":
        return 1 - logsigmoid(signed_B)
    if value == "risk_seeking_1":
        return 1 + sign_B * logsigmoid(-gain_B)
    if value == "risk_seeking_2":
        return 2 - sign_B * hold(gain_B / 100, high=LARGEST_EXPONENT[gain_B.dtype]).exp()
    return 1 + logsigmoid(-signed_B)


def kto(
    errors: Tensor,
    ref_errors: Tensor,
    desirable: Tensor,
    beta: float = 1000.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    value: Value = "sigmoid",
    all_reduce: Callable[[Tensor], Tensor] | None = None,
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """Diffusion-KTO: prospect-theoretic value of each sample around the batch's mean gain.

    weight (1 - h), g = r - e, g' = g - max(0, mean of g over all ranks), the mean a constant
    (arXiv:2404.04465, the authors' code). With a = +-beta g', + for desirable samples, h is

    - ``sigmoid``: sigmoid(a);
    - ``loss_averse``: logsigmoid(a);
    - ``risk_seeking_1``: -+logsigmoid(-beta g');
    - ``risk_seeking_2``: +-exp(beta g' / 100) - 1, the exponent held at 80 (700 in float64);
    - ``risk_seeking_3``: -logsigmoid(-a).

    The reference point is of the same samples, not of mismatched prompts; batches with one label
    alone are legal.

    Args:
        errors: [B] errors e of the policy (``fastpo.diffusion.noise_errors``), any float dtype.
        ref_errors: [B] errors r of the reference; no gradient.
        desirable: [B] bool labels.
        beta: strength of the tie to the reference, > 0.
        desirable_weight: weight of desirable samples, >= 0.
        undesirable_weight: weight of undesirable samples, >= 0.
        value: h.
        all_reduce: sums a tensor over ranks and returns it, for example
            ``fastpo.distributed.all_reduce_sum()``; without it the mean is this rank's.
        reduction: ``mean`` over samples, ``sum`` or ``none``.

    Returns:
        UnpairedOutput; the rewards are beta g, ``kl`` is the reference point.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> out = kto(torch.tensor([0.1, 0.4]), torch.tensor([0.3, 0.2]),
        ...           torch.tensor([True, False]), beta=2.0, reduction="none")
        >>> [round(x, 4) for x in out.loss.tolist()]
        [0.4013, 0.4013]
    """
    name = "diffusion.losses.kto"
    check_scale(name, "beta", beta)
    check_not_negative(name, "desirable_weight", desirable_weight)
    check_not_negative(name, "undesirable_weight", undesirable_weight)
    check_choice(name, "value", value, VALUES)
    check_choice(name, "reduction", reduction, REDUCTIONS)
    errors_B, ref_errors_B = prepare_errors(name, errors=errors, ref_errors=ref_errors)
    check_flags(name, "desirable", desirable, errors)
    gains_B = ref_errors_B.detach() - errors_B
    sums_2 = torch.stack((gains_B.detach().sum(), gains_B.new_full((), gains_B.shape[0])))
    if all_reduce is not None:
        sums_2 = all_reduce(sums_2)
    kl = (sums_2[0] / sums_2[1].clamp(min=1)).clamp(min=0)
    sign_B = torch.where(desirable, 1.0, -1.0).to(gains_B)
    shortfall_B = _shortfall(value, beta * (gains_B - kl), sign_B)
    loss_B = torch.where(
        desirable, desirable_weight * shortfall_B, undesirable_weight * shortfall_B
    )
    return unpaired_output(loss_B, beta * gains_B, reduction, kl=kl)
