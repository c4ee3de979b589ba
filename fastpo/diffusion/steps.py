"""Gaussian denoising steps: their coefficients, log-densities of next states, and KL.

A step draws x' ~ N(mu, s^2) with mu = a x + b prediction, every schedule below being linear in the
sample x and the model's prediction. Coefficients are per sample, in float64, and constants: numbers
of the schedule that require a gradient are refused.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastpo.diffusion._inputs import (
    Reduction,
    check_constant,
    check_fields,
    check_reduction,
    per_sample,
    placed,
)
from fastpo.operands import residuals
from fastpo.ops import noise_errors as op
from fastpo.ops._check import check_shape, fail

PredictionType = Literal["epsilon", "v_prediction", "sample"]


class Step(NamedTuple):
    """x' ~ N(sample_scale x + prediction_scale prediction, std^2), each [N] in float64.

    Attributes:
        sample_scale: a.
        prediction_scale: b.
        std: s; 0 for a deterministic step, which has no density.
    """

    sample_scale: Tensor
    prediction_scale: Tensor
    std: Tensor

    def mean(self, prediction: Tensor, sample: Tensor) -> Tensor:
        """mu, in the wider of float32 and the inputs' dtype."""
        acc = op.accumulation_of(prediction, sample)
        a, b = (
            scale.to(prediction.device, acc).reshape(-1, *[1] * (prediction.ndim - 1))
            for scale in (self.sample_scale, self.prediction_scale)
        )
        return a * sample.to(acc) + b * prediction.to(acc)


def _doubles(function: str, **numbers: Tensor | float) -> list[Tensor]:
    """Numbers as float64 [N], on one device."""
    tensors = [number for number in numbers.values() if isinstance(number, Tensor)]
    device = max(tensors, key=Tensor.dim).device if tensors else torch.device("cpu")
    placed_N = (
        placed(f"diffusion.{function}", name, number, torch.float64, device)
        for name, number in numbers.items()
    )
    return list(torch.broadcast_tensors(*placed_N))


def _clean_and_noise(
    function: str, abar_N: Tensor, prediction_type: PredictionType
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The factors of the sample and of the prediction in x0, and those in epsilon."""
    root, rest = abar_N.sqrt(), (1 - abar_N).sqrt()
    zero, one = torch.zeros_like(root), torch.ones_like(root)
    if prediction_type == "epsilon":
        return (1 / root, -rest / root), (zero, one)
    if prediction_type == "v_prediction":
        return (root, -rest), (rest, root)
    if prediction_type == "sample":
        return (zero, one), (1 / rest, -root / rest)
    expected, remedy = "epsilon, v_prediction or sample", "Flows go with flow_step."
    raise fail(f"diffusion.{function}", "prediction_type", expected, repr(prediction_type), remedy)


def ddim_step(
    alphas_cumprod: Tensor | float,
    alphas_cumprod_prev: Tensor | float,
    eta: Tensor | float = 1.0,
    prediction_type: PredictionType = "epsilon",
) -> Step:
    """A DDIM step from abar to abar_prev (arXiv:2010.02502 eq. 12 and 16); of DDPO, D3PO and SPO.

    s^2 = eta^2 (1 - abar_prev) / (1 - abar) (1 - abar / abar_prev),
    mu = sqrt(abar_prev) x0 + sqrt(1 - abar_prev - s^2) epsilon,
    x0 = (x - sqrt(1 - abar) epsilon) / sqrt(abar).

    Args:
        alphas_cumprod: [N] or a number, abar at the sample, in (0, 1).
        alphas_cumprod_prev: abar at the next state, nearer to 1.
        eta: 1 for the stochastic step of DDPM, 0 for a deterministic one.
        prediction_type: what the model predicts: epsilon, v = sqrt(abar) epsilon -
            sqrt(1 - abar) x0, or x0 (``sample``).

    Raises:
        ValueError: ``prediction_type`` is none of these.

    Example:
        >>> step = ddim_step(0.5, 0.6)
        >>> round(step.std.item(), 6)
        0.365148
    """
    a, p, eta_N = _doubles(
        "ddim_step", alphas_cumprod=alphas_cumprod, alphas_cumprod_prev=alphas_cumprod_prev, eta=eta
    )
    (x0_x, x0_m), (eps_x, eps_m) = _clean_and_noise("ddim_step", a, prediction_type)
    variance = eta_N.square() * (1 - p) / (1 - a) * (1 - a / p)
    noise_scale = (1 - p - variance).clamp(min=0).sqrt()  # of epsilon in mu
    sample_scale = p.sqrt() * x0_x + noise_scale * eps_x
    return Step(sample_scale, p.sqrt() * x0_m + noise_scale * eps_m, variance.sqrt())


def flow_step(
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    noise_level: float = 0.7,
    sigma_max: Tensor | float | None = None,
) -> Step:
    """A step of Flow-GRPO's SDE from sigma to sigma_next < sigma (arXiv:2505.05470 eq. 9).

    With dt = sigma_next - sigma and t = noise_level sqrt(sigma / (1 - sigma)):
    mu = x (1 + t^2 dt / (2 sigma)) + v (1 + t^2 (1 - sigma) / (2 sigma)) dt, s = t sqrt(-dt).

    Args:
        sigma: [N] or a number, in (0, 1].
        sigma_next: of the next state.
        noise_level: a.
        sigma_max: what takes the place of sigma = 1 under the root; the code has the schedule's
            second sigma. Needed where sigma is 1.

    Example:
        >>> step = flow_step(0.6, 0.5)
        >>> round((step.std / 0.1**0.5).item(), 6)
        0.857321
    """
    sigma_N, next_N = _doubles("flow_step", sigma=sigma, sigma_next=sigma_next)
    held = sigma_N
    if sigma_max is not None:
        max_N, _ = _doubles("flow_step", sigma_max=sigma_max, sigma=sigma_N)
        held = torch.where(sigma_N == 1, max_N, sigma_N)
    spread = noise_level * (sigma_N / (1 - held)).sqrt()
    dt = next_N - sigma_N
    sample_scale = 1 + spread.square() / (2 * sigma_N) * dt
    prediction_scale = (1 + spread.square() * (1 - sigma_N) / (2 * sigma_N)) * dt
    return Step(sample_scale, prediction_scale, spread * (-dt).sqrt())


def dance_step(sigma: Tensor | float, sigma_next: Tensor | float, eta: float = 0.3) -> Step:
    """A step of DanceGRPO's SDE from sigma to sigma_next < sigma (arXiv:2505.07818, its code).

    mu = x + v ds - eta^2 score ds / 2, score = -(x - (1 - sigma) x0) / sigma^2, x0 = x - sigma v,
    ds = sigma_next - sigma, s = eta sqrt(-ds).

    Args:
        sigma: of the state before the step, a number or [N], in (0, 1].
        sigma_next: of the state after it, below ``sigma``.
        eta: scale of the noise.

    Example:
        >>> round(dance_step(0.6, 0.5).std.item(), 6)
        0.094868
    """
    sigma_N, next_N = _doubles("dance_step", sigma=sigma, sigma_next=sigma_next)
    ds = next_N - sigma_N
    drift = eta**2 * ds / (2 * sigma_N)  # score = -(x + (1 - sigma) v) / sigma
    return Step(1 + drift, ds + drift * (1 - sigma_N), eta * (-ds).sqrt())


def renoise_step(
    alphas_cumprod: Tensor | float,
    alphas_cumprod_prev: Tensor | float,
    prediction_type: PredictionType = "epsilon",
) -> Step:
    """Back to abar_prev by fresh noise on the predicted x0, as few-step distilled models sample.

    mu = sqrt(abar_prev) x0, s = sqrt(1 - abar_prev); of PSO (arXiv:2410.03190).

    Example:
        >>> round(renoise_step(0.5, 0.6).std.item(), 6)
        0.632456
    """
    a, p = _doubles(
        "renoise_step", alphas_cumprod=alphas_cumprod, alphas_cumprod_prev=alphas_cumprod_prev
    )
    (x0_x, x0_m), _ = _clean_and_noise("renoise_step", a, prediction_type)
    return Step(p.sqrt() * x0_x, p.sqrt() * x0_m, (1 - p).sqrt())


def _guided(
    name: str, unconditional: Tensor | None, guidance_scale: Tensor | float, scale_N: Tensor,
    acc: torch.dtype,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Scales of the conditional and the unconditional prediction in b (u + g (c - u))."""
    guidance_N = per_sample(name, "guidance_scale", guidance_scale, scale_N, acc)
    if unconditional is None:
        if isinstance(guidance_scale, Tensor) or guidance_scale != 1:
            remedy = "Pass the unconditional prediction, or leave guidance_scale at 1."
            got = "a guidance scale alone"
            raise fail(name, "unconditional", "the prediction to guide away from", got, remedy)
        return scale_N, None
    return scale_N * guidance_N, scale_N * (1 - guidance_N)


def step_log_probs(
    step: Step,
    prediction: Tensor,
    sample: Tensor,
    next_samples: Tensor,
    *,
    unconditional: Tensor | None = None,
    guidance_scale: Tensor | float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Log-density of next states under a Gaussian denoising step, in nats.

    mean over elements of -(x' - mu)^2 / (2 s^2) - log s - log sqrt(2 pi), with mu = a x + b m and
    the guided prediction m = u + g (c - u) (DDPO, arXiv:2305.13301; Flow-GRPO, arXiv:2505.05470).
    The published codes take the mean, so that ratios are geometric means over elements and clip
    ranges are 1e-4; ``sum`` is the density. One read of each tensor; K candidates share it.

    Args:
        step: coefficients of N samples, from :func:`ddim_step` and its like.
        prediction: [N, ...] c, the model's (conditional) prediction; gets a gradient.
        sample: [N, ...] x, the state the step starts from.
        next_samples: [N, ...] x', or [N, K, ...] for K candidates.
        unconditional: [N, ...] u; gets a gradient unless detached (Flow-GRPO detaches it).
        guidance_scale: g, [N] or a number.
        reduction: ``mean`` or ``sum`` over elements.

    Returns:
        [N], or [N, K]; float32, or float64 if a tensor is. A deterministic step gives NaN or inf.

    Raises:
        ValueError: a shape, dtype, device or option does not fit, or a constant has requires_grad.

    Example:
        >>> x, eps = torch.tensor([[0.5, -0.3, 0.8, 0.1]]), torch.tensor([[0.2, 0.1, -0.4, 0.6]])
        >>> x_next = torch.tensor([[0.48, -0.25, 0.9, 0.0]])
        >>> round(step_log_probs(ddim_step(0.5, 0.6), eps, x, x_next).item(), 5)
        0.07017
    """
    name = "diffusion.step_log_probs"
    check_fields(name, prediction=prediction, sample=sample, unconditional=unconditional)
    check_constant(name, sample=sample, next_samples=next_samples)
    single = next_samples.ndim == prediction.ndim
    states = next_samples[:, None] if single else next_samples
    expected = (prediction.shape[0], *states.shape[1:2], *prediction.shape[1:])
    check_shape(name, "next_samples", states, expected, "[N, K, ...] of prediction [N, ...]")
    check_fields(
        name, prediction=prediction, next_samples=states[:, 0] if states.shape[1] else None
    )
    check_reduction(name, reduction)
    acc = op.accumulation_of(prediction, unconditional, sample, states)
    sample_N, scale_N, std_N = (
        per_sample(name, f"step.{field}", numbers, prediction, acc)
        for field, numbers in step._asdict().items()
    )
    scale_N, second_N = _guided(name, unconditional, guidance_scale, scale_N, acc)
    sums_NK, _ = op.noise_errors(
        residuals(
            prediction,
            states,
            second_prediction=unconditional,
            second_target=sample,
            prediction_scale=scale_N,
            second_prediction_scale=second_N,
            second_target_scale=-sample_N,
        )
    )
    elements = max(math.prod(prediction.shape[1:]), 1)
    log_scale_N1 = (std_N.log() + 0.5 * math.log(2 * math.pi))[:, None]
    logprobs_NK = -sums_NK / (2 * std_N.square())[:, None]
    if reduction == "mean":
        logprobs_NK = logprobs_NK / elements - log_scale_N1
    else:
        logprobs_NK = logprobs_NK - elements * log_scale_N1
    return logprobs_NK[:, 0] if single else logprobs_NK


def step_kl(
    step: Step,
    prediction: Tensor,
    reference: Tensor,
    *,
    unconditional: Tensor | None = None,
    reference_unconditional: Tensor | None = None,
    guidance_scale: Tensor | float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL of a step from the reference's step of the same sample, in nats.

    mean over elements of (mu - mu_ref)^2 / (2 s^2), where mu - mu_ref = b (m - m_ref): the sample
    drops out. Flow-GRPO's code has t in place of s = t sqrt(-dt), so its KL is -dt times this.

    Args:
        reference: [N, ...] the reference's prediction; no gradient.
        unconditional: [N, ...] u of the policy; gets a gradient unless detached.
        reference_unconditional: that of the reference; both or neither.

    Other arguments, result and errors are those of :func:`step_log_probs`.

    Example:
        >>> step = flow_step(0.6, 0.5)
        >>> policy, reference = torch.tensor([[0.1, 0.2]]), torch.tensor([[0.1, 0.1]])
        >>> round(step_kl(step, policy, reference).item(), 6)
        0.000527
    """
    name = "diffusion.step_kl"
    check_fields(
        name, prediction=prediction, reference=reference, unconditional=unconditional,
        reference_unconditional=reference_unconditional,
    )  # fmt: skip
    if (unconditional is None) != (reference_unconditional is None):
        remedy = "Guide both predictions, or neither."
        got = "one of the two"
        raise fail(name, "reference_unconditional", "one for each prediction", got, remedy)
    check_reduction(name, reduction)
    acc = op.accumulation_of(prediction, reference, unconditional, reference_unconditional)
    scale_N = per_sample(name, "step.prediction_scale", step.prediction_scale, prediction, acc)
    std_N = per_sample(name, "step.std", step.std, prediction, acc)
    scale_N, second_N = _guided(name, unconditional, guidance_scale, scale_N / std_N, acc)
    if reference_unconditional is not None:
        reference_unconditional = reference_unconditional.detach()
    sums_NK, _ = op.noise_errors(
        residuals(
            prediction,
            reference.detach()[:, None],
            second_prediction=unconditional,
            second_target=reference_unconditional,
            prediction_scale=scale_N,
            second_prediction_scale=second_N,
            target_scale=scale_N,
            second_target_scale=second_N,
        )
    )
    elements = max(math.prod(prediction.shape[1:]), 1)
    return sums_NK[:, 0] / (2 * (elements if reduction == "mean" else 1))
