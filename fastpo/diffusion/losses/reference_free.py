"""Losses over pairs of samples, without a reference model.

All take the errors e of :func:`fastpo.diffusion.noise_errors`: a lower error is a likelier sample.
Weights of the timestep go into the errors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.bounds import hold
from fastpo.diffusion.losses._common import check_scale, prepare_errors
from fastpo.losses._common import (
    REDUCTIONS,
    LossOutput,
    Reduction,
    UnpairedOutput,
    check_choice,
    check_flags,
    check_not_negative,
    pair_output,
    unpaired_output,
)
from fastpo.losses.margins import soft_logistic


def _pair(
    loss: str, chosen_errors: Tensor, rejected_errors: Tensor, reduction: Reduction
) -> list[Tensor]:
    check_choice(loss, "reduction", reduction, REDUCTIONS)
    return prepare_errors(loss, chosen_errors=chosen_errors, rejected_errors=rejected_errors)


def contrast(
    chosen_errors: Tensor, rejected_errors: Tensor, reduction: Reduction = "mean"
) -> LossOutput:
    """DSO's direct reward optimisation: lower the chosen's error, raise the rejected's.

    e_chosen - e_rejected  (DRO of arXiv:2503.22677, the authors' code). Unbounded below: it needs
    early stopping, or an adapter of low rank. For labels without pairs, see
    :func:`contrast_unpaired`.

    Args:
        chosen_errors: [B] errors of the chosen samples, any float dtype.
        rejected_errors: [B] of the rejected samples.
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Returns:
        LossOutput; the rewards are -e.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> round(contrast(torch.tensor([0.2]), torch.tensor([0.25])).loss.item(), 4)
        -0.05
    """
    name = "diffusion.losses.contrast"
    chosen_B, rejected_B = _pair(name, chosen_errors, rejected_errors, reduction)
    return pair_output(chosen_B - rejected_B, -chosen_B, -rejected_B, reduction)


def contrast_unpaired(
    errors: Tensor, desirable: Tensor, reduction: Reduction = "mean"
) -> UnpairedOutput:
    """:func:`contrast` of single labelled samples: e where desirable, -e elsewhere.

    Args:
        errors: [B] errors of the samples, any float dtype.
        desirable: [B] bool labels.
        reduction: ``mean`` over samples, ``sum`` or ``none``.

    Returns:
        UnpairedOutput; the rewards are -e.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> out = contrast_unpaired(torch.tensor([0.2, 0.25]), torch.tensor([True, False]))
        >>> round(out.loss.item(), 4)
        -0.025
    """
    name = "diffusion.losses.contrast_unpaired"
    check_choice(name, "reduction", reduction, REDUCTIONS)
    (errors_B,) = prepare_errors(name, errors=errors)
    check_flags(name, "desirable", desirable, errors_B)
    return unpaired_output(torch.where(desirable, errors_B, -errors_B), -errors_B, reduction)


def _x_over_expm1(x_B: Tensor) -> Tensor:
    """The quotient of x >= 0 and exp(x) - 1, 1 at 0, exact with its gradient.

    Near 0 the quotient's gradient would be a difference of two large numbers: the series of
    Bernoulli numbers there, which below 0.1 is exact in float64. Elsewhere exp(-x), which cannot
    overflow.
    """
    near_B = x_B < 0.1
    small_B, large_B = hold(x_B, high=0.1), hold(x_B, low=0.1)
    square_B = small_B * small_B
    even_B = square_B * (1 / 12 + square_B * (
        -1 / 720 + square_B * (1 / 30240 - square_B / 1209600)))  # fmt: skip
    quotient_B = large_B * torch.exp(-large_B) / -torch.expm1(-large_B)
    return torch.where(near_B, 1 - small_B / 2 + even_B, quotient_B)


def mapo(
    chosen_errors: Tensor,
    rejected_errors: Tensor,
    beta: float = 0.1,
    snr: float = 0.5,
    timesteps: int = 1000,
    reduction: Reduction = "mean",
) -> LossOutput:
    """MaPO, margin-aware preference optimisation: likelihood of the chosen, and a bounded margin.

    e_chosen - beta logsigmoid(T (phi(snr e_chosen) - phi(snr e_rejected))), phi(x) = x / expm1(x)
    (arXiv:2406.06424, the authors' code). phi falls from 1 at x = 0, where the published
    expression is 0 / 0. beta = 0 is supervised fine-tuning on the chosen samples.

    Args:
        chosen_errors: [B] errors of the chosen samples, any float dtype, >= 0.
        rejected_errors: [B] of the rejected samples.
        beta: weight of the margin term, >= 0.
        snr: factor of the errors, > 0; a constant in the code.
        timesteps: T, of the training schedule.
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Returns:
        LossOutput; the rewards are T phi(snr e).

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> out = mapo(torch.tensor([0.20, 0.30]), torch.tensor([0.25, 0.28]))
        >>> round(out.loss.item(), 4)
        0.4884
    """
    name = "diffusion.losses.mapo"
    check_not_negative(name, "beta", beta)
    check_scale(name, "snr", snr)
    check_scale(name, "timesteps", timesteps)
    chosen_B, rejected_B = _pair(name, chosen_errors, rejected_errors, reduction)
    rewards = [timesteps * _x_over_expm1(snr * errors_B) for errors_B in (chosen_B, rejected_B)]
    loss_B = chosen_B + beta * soft_logistic(rewards[0] - rewards[1])
    return pair_output(loss_B, *rewards, reduction)


def orpo(
    chosen_errors: Tensor,
    rejected_errors: Tensor,
    beta: float = 0.1,
    published_sign: bool = False,
    reduction: Reduction = "mean",
) -> LossOutput:
    """ORPO for diffusion: likelihood of the chosen, and a logistic loss on the errors.

    e_chosen - beta logsigmoid(e_rejected - e_chosen), after diffusers' research example. The
    example has e_chosen - e_rejected in the sigmoid, which rewards a larger error on the chosen
    sample; ``published_sign`` reproduces it. beta = 0 is supervised fine-tuning.

    Args:
        chosen_errors: [B] errors of the chosen samples, any float dtype.
        rejected_errors: [B] of the rejected samples.
        beta: weight of the ratio term, >= 0.
        published_sign: the loss of the published code.
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Returns:
        LossOutput; the rewards are -beta e, with either sign of the loss.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> round(orpo(torch.tensor([0.2]), torch.tensor([0.25])).loss.item(), 4)
        0.2668
    """
    name = "diffusion.losses.orpo"
    check_not_negative(name, "beta", beta)
    chosen_B, rejected_B = _pair(name, chosen_errors, rejected_errors, reduction)
    margin_B = chosen_B - rejected_B if published_sign else rejected_B - chosen_B
    loss_B = chosen_B + beta * soft_logistic(margin_B)
    return pair_output(loss_B, -beta * chosen_B, -beta * rejected_B, reduction)


def cpo(
    chosen_errors: Tensor,
    rejected_errors: Tensor,
    beta: float = 2500.0,
    sft_weight: float = 1.0,
    reduction: Reduction = "mean",
) -> LossOutput:
    """CPO for diffusion: Diffusion-DPO with a uniform reference, plus likelihood.

    -logsigmoid(beta (e_rejected - e_chosen)) + sft_weight e_chosen: :func:`dpo` with kappa 1 and
    reference errors of 0, plus supervised fine-tuning on the chosen samples, as
    :func:`fastpo.losses.cpo` is of DPO (arXiv:2401.08417).

    Args:
        chosen_errors: [B] errors of the chosen samples, any float dtype.
        rejected_errors: [B] of the rejected samples.
        beta: scale of the errors, > 0.
        sft_weight: weight of the chosen sample's error, >= 0.
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Returns:
        LossOutput; the rewards are -beta e.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Experimental: derived, without a publication; the defaults are our choice (diffusers' script for
    SD 1.5 names the loss among its options, and does not have it).

    Example:
        >>> out = cpo(torch.tensor([0.20]), torch.tensor([0.25]), beta=10.0)
        >>> round(out.loss.item(), 4)
        0.6741
    """
    name = "diffusion.losses.cpo"
    check_scale(name, "beta", beta)
    check_not_negative(name, "sft_weight", sft_weight)
    chosen_B, rejected_B = _pair(name, chosen_errors, rejected_errors, reduction)
    loss_B = soft_logistic(beta * (rejected_B - chosen_B)) + sft_weight * chosen_B
    return pair_output(loss_B, -beta * chosen_B, -beta * rejected_B, reduction)
