"""Losses that distil a model: by differences of scores, and on what it samples itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.checks import check_tensors
from fastpo.diffusion import targets
from fastpo.diffusion._inputs import check_fields, per_sample
from fastpo.diffusion.errors import noise_errors
from fastpo.losses._common import (
    REDUCTIONS,
    LossOutput,
    Reduction,
    UnpairedOutput,
    check_choice,
    pair_output,
    unpaired_output,
)
from fastpo.ops.noise_errors import accumulation_of


def _mean_product(name: str, sample: Tensor, weights: Tensor | float, **scores: Tensor) -> Tensor:
    """[N] weights times the mean over elements of sample times the difference of two scores."""
    check_fields(name, sample=sample, **scores)
    teacher, own = (score.detach() for score in scores.values())
    acc = accumulation_of(sample, teacher, own)
    difference = teacher.to(acc) - own.to(acc)
    means_N = (difference * sample.to(acc)).unsqueeze(-1).flatten(1).mean(1)
    return per_sample(name, "weights", weights, sample, acc) * means_N


def distillation_dpo(
    chosen: Tensor,
    rejected: Tensor,
    teacher_chosen: Tensor,
    teacher_rejected: Tensor,
    better_chosen: Tensor,
    worse_rejected: Tensor,
    weights: Tensor | float = 1.0,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Distillation-DPO's student loss: towards better samples and from worse, by score differences.

    mean (eps_T(x_w,t) - eps_B(x_w,t)) x_w - mean (eps_T(x_l,t) - eps_W(x_l,t)) x_l, the
    differences constants (arXiv:2504.11447). The teacher T is frozen; B and W are fitted by their
    noise errors to better and to worse samples of the student. A gradient step moves each sample
    along a difference of scores.

    The published code multiplies by x_t - x in place of x. That is the noise, constant in the
    student's parameters, and its gradient is 0; this is the form intended.

    Args:
        chosen: [N, ...] x_w, the better of the student's two samples, any float dtype.
        rejected: x_l, the worse one, in the same shape.
        teacher_chosen: eps_T at x_w noised to a timestep t; no gradient.
        teacher_rejected: eps_T at x_l noised with the same noise; no gradient.
        better_chosen: eps_B at the noised x_w; no gradient.
        worse_rejected: eps_W at the noised x_l; no gradient.
        weights: of the timestep, [N] or a number.
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Returns:
        LossOutput; the rewards are the two terms of each pair, with the sign that makes their
        difference the negative loss.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Example:
        >>> student = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> zero, one = torch.zeros(1, 2), torch.ones(1, 2)
        >>> distillation_dpo(student, student.detach(), one, zero, zero, zero).loss.backward()
        >>> student.grad
        tensor([[0.5000, 0.5000]])
    """
    check_tensors(
        "diffusion.losses.distillation_dpo",
        chosen=chosen,
        rejected=rejected,
        teacher_chosen=teacher_chosen,
        teacher_rejected=teacher_rejected,
        better_chosen=better_chosen,
        worse_rejected=worse_rejected,
    )
    name = "diffusion.losses.distillation_dpo"
    check_choice(name, "reduction", reduction, REDUCTIONS)
    check_fields(name, chosen=chosen, rejected=rejected)
    chosen_B = -_mean_product(
        name, chosen, weights, teacher_chosen=teacher_chosen, better_chosen=better_chosen
    )
    rejected_B = -_mean_product(
        name, rejected, weights, teacher_rejected=teacher_rejected, worse_rejected=worse_rejected
    )
    return pair_output(rejected_B - chosen_B, chosen_B, rejected_B, reduction)


def self_npo(
    prediction: Tensor,
    noisy: Tensor,
    clean: Tensor,
    alphas_cumprod: Tensor | float,
    huber: float = 1e-3,
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """Self-NPO: the model's x0 is fitted to the end of a short unconditional rollout of its own.

    mean sqrt(d^2 + c^2) - c, d = x0_hat - y, x0_hat = (x_t - sigma eps_hat) / alpha
    (arXiv:2505.11777, the authors' code). A teacher, the running mean of the weights, takes up to
    five DDIM steps without the prompt; y is the x0 it predicts there. :func:`renoise` leads on to
    x_t, where the model sees the prompt. The result is the negative model of
    ``fastpo.diffusion.guidance.guided``.

    Args:
        prediction: [N, ...] eps_hat at x_t, any float dtype.
        noisy: x_t; no gradient.
        clean: y; no gradient.
        alphas_cumprod: [N] or a number, abar at x_t, alpha^2 = 1 - sigma^2.
        huber: c, >= 0, in units of x0; 0 for d^2, the default of the code, whose scripts have
            1e-3.
        reduction: ``mean`` over samples, ``sum`` or ``none``.

    Returns:
        UnpairedOutput; the rewards are the negative errors.

    Raises:
        ValueError: a shape, dtype, device or option does not fit.

    Example:
        >>> x_t, eps, y = torch.tensor([[0.9]]), torch.tensor([[0.5]]), torch.tensor([[0.7]])
        >>> round(self_npo(eps, x_t, y, 0.64, huber=0.0).loss.item(), 6)
        0.0025
    """
    check_tensors("diffusion.losses.self_npo", prediction=prediction, noisy=noisy, clean=clean)
    name = "diffusion.losses.self_npo"
    check_choice(name, "reduction", reduction, REDUCTIONS)
    abar_N = per_sample(name, "alphas_cumprod", alphas_cumprod, prediction, torch.float64)
    # d = -(sigma / alpha) (eps_hat - eps), with the noise eps that leads from y to x_t.
    errors_N = noise_errors(
        prediction,
        targets.inverted(noisy, clean, abar_N),
        scale=((1 - abar_N) / abar_N).sqrt(),
        huber=huber,
    )
    return unpaired_output(errors_N, -errors_N, reduction)


def renoise(
    noisy: Tensor,
    noise: Tensor,
    alphas_cumprod: Tensor | float,
    next_alphas_cumprod: Tensor | float,
) -> Tensor:
    """Carry a noised sample on to a noisier level by fresh noise.

    alpha' (x / alpha + sqrt(nsr'^2 - nsr^2) n), nsr = sigma / alpha: distributed as if the clean
    sample had been noised to that level at once. Of Self-NPO (arXiv:2505.11777).

    Args:
        noisy: [N, ...] x.
        noise: n, standard normal, in the same shape.
        alphas_cumprod: [N] or a number, abar = alpha^2 at x.
        next_alphas_cumprod: abar to go to, not above: NaN otherwise.

    Returns:
        In the dtype of ``noisy``, without gradient.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Example:
        >>> renoise(torch.tensor([[0.3, -0.1]]), torch.tensor([[1.0, -0.5]]), 0.64, 0.25)
        tensor([[ 0.9681, -0.4528]])
    """
    check_tensors("diffusion.losses.renoise", noisy=noisy, noise=noise)
    name = "diffusion.losses.renoise"
    noisy, noise = noisy.detach(), noise.detach()
    check_fields(name, noisy=noisy, noise=noise)
    levels = (("alphas_cumprod", alphas_cumprod), ("next_alphas_cumprod", next_alphas_cumprod))
    abar_N, next_N = (per_sample(name, key, abar, noisy, torch.float64) for key, abar in levels)
    kept_N = next_N / abar_N
    # alpha'^2 (nsr'^2 - nsr^2) = 1 - alpha'^2 / alpha^2
    acc = accumulation_of(noisy, noise)
    kept, added = (
        scale_N.sqrt().to(acc).reshape(-1, *[1] * (noisy.ndim - 1))
        for scale_N in (kept_N, 1 - kept_N)
    )
    return (kept * noisy.to(acc) + added * noise.to(acc)).to(noisy.dtype)
