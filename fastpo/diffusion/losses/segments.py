"""Losses over pairs whose errors are kept apart along time: segments of a video, denoising steps.

Inside one sigmoid per pair all errors of a sample are summed, with labels or weights.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastpo.checks import check_tensors
from fastpo.diffusion.losses._common import check_scale, error_gains, prepare_errors
from fastpo.losses._common import (
    REDUCTIONS,
    LossOutput,
    Reduction,
    check_choice,
    fail,
    pair_output,
)
from fastpo.losses.margins import soft_logistic


def dense_dpo(
    chosen_errors: Tensor,
    rejected_errors: Tensor,
    ref_chosen_errors: Tensor,
    ref_rejected_errors: Tensor,
    labels: Tensor,
    beta: float = 500.0,
    weights: Tensor | None = None,
    norm: Literal["all", "valid", "none"] = "all",
    reduction: Reduction = "mean",
) -> LossOutput:
    """DenseDPO: a preference for each segment of two videos that share their structure.

    -logsigmoid(beta w / F sum_f l_f (a_f - b_f))  (arXiv:2506.03517, eq. 7), a and b the gains on
    the reference of each segment and l its label. Labels all 1 and segments of one length are
    :func:`dpo` on the means over the clip, with kappa 1. The errors come from
    ``noise_errors(..., segment_dim=...)``, for a flow target.

    Args:
        chosen_errors: [B, F] errors of the first video's segments.
        rejected_errors: [B, F] of the second video's.
        ref_chosen_errors: [B, F] of the reference on the first video.
        ref_rejected_errors: [B, F] of the reference on the second video.
        labels: [B, F] l: 1 where the first video is better, -1 where the second is, 0 for a tie.
            Not checked, as that would wait for the device. Errors at 0 are harmless, even NaN.
        beta: strength of the tie to the reference, > 0.
        weights: [B] w, of the timestep; 1 if not given.
        norm: divide the sum by F (``all``), by the number of labels that are not 0 (``valid``;
            the paper does not say whether ties count), or by 1 (``none``).
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Returns:
        LossOutput; the rewards are beta / F sum_f l_f a_f and the same of b, by ``norm``.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> first, second = torch.tensor([[0.10, -0.05, 0.20]]), torch.tensor([[0.02, 0.07, 0.11]])
        >>> zero, labels = torch.zeros(1, 3), torch.tensor([[1, -1, 0]])
        >>> round(dense_dpo(first, second, zero, zero, labels, beta=2.0).loss.item(), 4)
        0.762
    """
    check_tensors("diffusion.losses.dense_dpo", {"weights": weights}, labels=labels)
    name = "diffusion.losses.dense_dpo"
    check_scale(name, "beta", beta)
    check_choice(name, "norm", norm, ("all", "valid", "none"))
    chosen_BF, rejected_BF, weights_B = error_gains(
        name, chosen_errors, rejected_errors, ref_chosen_errors, ref_rejected_errors, weights,
        reduction, "[B, F]",
    )  # fmt: skip
    chosen_BF, rejected_BF, labels_BF = prepare_errors(
        name, "[B, F]", chosen_errors=chosen_BF, rejected_errors=rejected_BF, labels=labels.detach()
    )
    valid_BF = labels_BF != 0
    divisor = {
        "all": max(labels_BF.shape[1], 1), "valid": valid_BF.sum(1).clamp(min=1), "none": 1,
    }[norm]  # fmt: skip

    def labelled(gains_BF: Tensor) -> Tensor:
        return beta * torch.where(valid_BF, labels_BF * gains_BF, 0.0).sum(1) / divisor

    loss_B = soft_logistic(weights_B * labelled(chosen_BF - rejected_BF))
    rewards = labelled(chosen_BF.detach()), labelled(rejected_BF.detach())
    return pair_output(loss_B, *rewards, reduction)


def inversion_dpo(
    chosen_errors: Tensor,
    rejected_errors: Tensor,
    alphas_cumprod: Tensor,
    beta: float = 2000.0,
    kappa: float = 0.5,
    published_sign: bool = True,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Inversion-DPO: Diffusion-DPO along the reference's own DDIM inversion of each sample.

    -logsigmoid(kappa beta (S_chosen - S_rejected)),  S = mean over the steps of d_t / (2 abar_t)
    (arXiv:2507.11554, the authors' code), d_t the error of the policy's prediction to that of the
    reference at the states that the inversion visits. The reference's own error is 0 there, so S is
    the loss of likelihood against it. At policy = reference all d_t are 0, and so is the gradient:
    training has to start elsewhere.

    This is the sign of the authors' code, which drives the policy away from the reference on the
    chosen samples. A derivation from DPO gives the other one, -logsigmoid(-kappa beta (...)), which
    ties it to the reference there: ``published_sign=False``.

    Args:
        chosen_errors: [B, S] d_t on the chosen samples, ``noise_errors(prediction, reference)`` at
            each of S steps; both predictions with the guidance of the inversion.
        rejected_errors: [B, S] on the rejected samples.
        alphas_cumprod: [S] or [B, S] abar_t of the steps, in (0, 1].
        beta: strength of the tie to the reference, > 0.
        kappa: factor of beta, > 0.
        published_sign: the sign of the authors' code; False for that of the derivation.
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Returns:
        LossOutput; the rewards are -kappa beta S, with either sign of the loss.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Experimental: the sign printed in the paper was not found.

    Example:
        >>> out = inversion_dpo(torch.tensor([[0.02, 0.05]]), torch.tensor([[0.04, 0.03]]),
        ...                     torch.tensor([0.9, 0.6]), beta=20.0)
        >>> round(out.loss.item(), 4)
        0.6794
    """
    check_tensors("diffusion.losses.inversion_dpo", alphas_cumprod=alphas_cumprod)
    name = "diffusion.losses.inversion_dpo"
    check_scale(name, "beta", beta)
    check_scale(name, "kappa", kappa)
    check_choice(name, "reduction", reduction, REDUCTIONS)
    chosen_BS, rejected_BS = prepare_errors(
        name, "[B, S]", chosen_errors=chosen_errors, rejected_errors=rejected_errors
    )
    steps = chosen_BS.shape[1]
    fits = alphas_cumprod.shape in ((steps,), chosen_BS.shape)
    if not fits or alphas_cumprod.device != chosen_BS.device:
        expected = f"[{steps}] or {list(chosen_BS.shape)} on {chosen_BS.device}"
        got = f"{list(alphas_cumprod.shape)} on {alphas_cumprod.device}"
        raise fail(name, "alphas_cumprod", expected, got, "Give abar of every step.")
    scales = kappa * beta / (2 * alphas_cumprod.detach().to(chosen_BS.dtype) * max(steps, 1))
    margin_B = (scales * (rejected_BS - chosen_BS)).sum(1)
    rewards = (-(scales * errors_BS).sum(1) for errors_BS in (chosen_BS, rejected_BS))
    loss_B = soft_logistic(-margin_B if published_sign else margin_B)
    return pair_output(loss_B, *rewards, reduction)
