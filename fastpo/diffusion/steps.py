"""Gaussian denoising steps: their coefficients, log-densities of next states, and KL.

A step draws x' ~ N(mu, s^2) with mu = a x + b prediction, every schedule below being linear in the
sample x and the model's prediction. Coefficients are per sample, in float64, and constants: numbers
of the schedule that require a gradient are refused.

Numbers out of the range of their step are refused, and so are those of tensors on the CPU; tensors
elsewhere are not read, which would wait for the device. A step of numbers that leave no noise is
refused too: it has no density. Among those of a trajectory, in tensors, it is let through, and
:func:`step_log_probs` and :func:`step_kl` mask it.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastpo.checks import check_tensors
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

    Example:
        >>> ddim_step(torch.tensor([0.5, 0.5]), torch.tensor([0.6, 1.0])).has_density()
        tensor([ True, False])
    """

    sample_scale: Tensor
    prediction_scale: Tensor
    std: Tensor

    def has_density(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Which steps have a finite density in a dtype; bool [N]. The others are masked."""
        scale, factor, variance = self.sample_scale, self.prediction_scale, self.std.square()
        finite = scale.to(dtype).isfinite() & factor.to(dtype).isfinite()
        return finite & variance.to(dtype).isfinite() & (variance.to(dtype) > 0)

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


def _check_range(
    function: str, argument: str, numbers: Tensor | float, low: Tensor | float,
    high: Tensor | float, ends: str,
) -> None:  # fmt: skip
    """Numbers lie between two others, without the ends at round brackets; tensors always with them.

    Raises:
        ValueError: one does not, of those that can be read without waiting for a device.
    """
    given = (numbers, low, high)
    elsewhere = any(isinstance(x, Tensor) and x.device.type != "cpu" for x in given)
    if elsewhere or torch.compiler.is_compiling():
        return
    # A tensor's steps without noise are masked where their density is asked.
    ends = "[]" if isinstance(numbers, Tensor) else ends
    numbers_N, low_N, high_N = torch.broadcast_tensors(
        *(torch.as_tensor(x, dtype=torch.float64, device="cpu").detach() for x in given)
    )
    above = numbers_N >= low_N if ends[0] == "[" else numbers_N > low_N
    below = numbers_N <= high_N if ends[1] == "]" else numbers_N < high_N
    outside = ~(above & below & numbers_N.isfinite())
    if outside.any():
        got, least, most = (x[outside][0].item() for x in (numbers_N, low_N, high_N))
        expected = f"a number in {ends[0]}{least:g}, {most:g}{ends[1]}"
        remedy = "A step goes from more noise to less, and adds some."
        raise fail(f"diffusion.{function}", argument, expected, repr(got), remedy)


def _check_abar(
    function: str, abar: Tensor | float, previous: Tensor | float, prediction_type: str
) -> None:
    """A step towards abar 1. At 0 there is no x0 to be had from a predicted epsilon."""
    _check_range(
        function, "alphas_cumprod", abar, 0.0, 1.0, "()" if prediction_type == "epsilon" else "[)"
    )
    _check_range(function, "alphas_cumprod_prev", previous, abar, 1.0, "()")


def _check_noise(
    function: str, argument: str, level: Tensor | float, most: float, *ends: Tensor | float
) -> None:
    """A level of noise; 0, for the steps of an ODE, between tensors alone."""
    brackets = "[" if any(isinstance(end, Tensor) for end in ends) else "("
    brackets += ")" if most == math.inf else "]"
    _check_range(function, argument, level, 0.0, most, brackets)


def _check_sigmas(function: str, sigma: Tensor | float, sigma_next: Tensor | float) -> None:
    """A step towards sigma 0."""
    _check_range(function, "sigma", sigma, 0.0, 1.0, "(]")
    _check_range(function, "sigma_next", sigma_next, 0.0, sigma, "[)")


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
        alphas_cumprod: [N] or a number, abar at the sample, in (0, 1), or 0 where the model
            predicts no epsilon.
        alphas_cumprod_prev: abar at the next state, in (alphas_cumprod, 1).
        eta: 1 for the stochastic step of DDPM, in (0, 1]; 0, for a deterministic one, goes with
            tensors.
        prediction_type: what the model predicts: epsilon, v = sqrt(abar) epsilon -
            sqrt(1 - abar) x0, or x0 (``sample``).

    Raises:
        ValueError: ``prediction_type`` is none of these, or a number is out of its range.

    Example:
        >>> step = ddim_step(0.5, 0.6)
        >>> round(step.std.item(), 6)
        0.365148
    """
    _check_abar("ddim_step", alphas_cumprod, alphas_cumprod_prev, prediction_type)
    _check_noise("ddim_step", "eta", eta, 1.0, alphas_cumprod, alphas_cumprod_prev)
    a, p, eta_N = _doubles(
        "ddim_step", alphas_cumprod=alphas_cumprod, alphas_cumprod_prev=alphas_cumprod_prev, eta=eta
    )
    (x0_x, x0_m), (eps_x, eps_m) = _clean_and_noise("ddim_step", a, prediction_type)
    variance = eta_N.square() * (1 - p) / (1 - a) * (1 - a / p)
    # What epsilon gives to mu of the noise of p: none at abar 0 and eta 1, and less is no step.
    rest_N = torch.where(eta_N > 1, math.nan, (1 - p - variance).clamp(min=0))
    noise_scale = rest_N.sqrt()
    sample_scale = p.sqrt() * x0_x + noise_scale * eps_x
    return Step(sample_scale, p.sqrt() * x0_m + noise_scale * eps_m, variance.sqrt())


def _sde_step(sigma_N: Tensor, next_N: Tensor, spread_N: Tensor) -> Step:
    """An Euler step of a flow's SDE whose noise has this spread per root of time."""
    dt = next_N - sigma_N
    drift = spread_N.square() / (2 * sigma_N) * dt
    return Step(1 + drift, dt + drift * (1 - sigma_N), spread_N * (-dt).sqrt())


def flow_step(
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    noise_level: Tensor | float = 0.7,
    sigma_max: Tensor | float | None = None,
) -> Step:
    """A step of Flow-GRPO's SDE from sigma to sigma_next < sigma (arXiv:2505.05470 eq. 9).

    With dt = sigma_next - sigma and t = noise_level sqrt(sigma / (1 - min(sigma, sigma_max))):
    mu = x (1 + t^2 dt / (2 sigma)) + v (1 + t^2 (1 - sigma) / (2 sigma)) dt, s = t sqrt(-dt).
    The ports to video have another spread, :func:`wan_step`.

    Args:
        sigma: [N] or a number, in (0, 1].
        sigma_next: of the next state, in [0, sigma).
        noise_level: a > 0.
        sigma_max: in (0, 1), where sigma is held under the root; the code has the schedule's second
            sigma. By default a sigma of 1, or UniPC's 1 - 1e-6, is held at its sigma_next, which is
            that one.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> step = flow_step(0.6, 0.5)
        >>> round((step.std / 0.1**0.5).item(), 6)
        0.857321
        >>> round(flow_step(0.999999, 0.98).std.item(), 2)
        0.7
    """
    _check_sigmas("flow_step", sigma, sigma_next)
    _check_noise("flow_step", "noise_level", noise_level, math.inf, sigma, sigma_next)
    sigma_N, next_N, level_N = _doubles(
        "flow_step", sigma=sigma, sigma_next=sigma_next, noise_level=noise_level
    )
    if sigma_max is None:
        held_N = torch.where(sigma_N > 1 - 1e-5, next_N, sigma_N)
    else:
        _check_range("flow_step", "sigma_max", sigma_max, 0.0, 1.0, "()")
        held_N = torch.minimum(*_doubles("flow_step", sigma_max=sigma_max, sigma=sigma_N))
    return _sde_step(sigma_N, next_N, level_N * (sigma_N / (1 - held_N)).sqrt())


def wan_step(
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    sigma_max: Tensor | float = 1.0,
    sigma_min: Tensor | float = 0.0,
) -> Step:
    """A step of the SDE in Flow-GRPO's ports to Wan, from sigma to sigma_next < sigma.

    :func:`flow_step` with t = sigma_min + (sigma_max - sigma_min) sigma, which has no pole at 1.

    Args:
        sigma: [N] or a number, in (0, 1].
        sigma_next: of the next state, in [0, sigma).
        sigma_max: in (sigma_min, 1]; the first ports have the schedule's second sigma, later ones
            its first.
        sigma_min: the schedule's last sigma, in [0, 1).

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> round(wan_step(0.999999, 0.98, sigma_max=0.98).std.item(), 6)
        0.138589
    """
    _check_sigmas("wan_step", sigma, sigma_next)
    _check_range("wan_step", "sigma_min", sigma_min, 0.0, 1.0, "[)")
    _check_range("wan_step", "sigma_max", sigma_max, sigma_min, 1.0, "(]")
    sigma_N, next_N, max_N, min_N = _doubles(
        "wan_step", sigma=sigma, sigma_next=sigma_next, sigma_max=sigma_max, sigma_min=sigma_min
    )
    return _sde_step(sigma_N, next_N, min_N + (max_N - min_N) * sigma_N)


def dance_step(
    sigma: Tensor | float, sigma_next: Tensor | float, eta: Tensor | float = 0.3
) -> Step:
    """A step of DanceGRPO's SDE from sigma to sigma_next < sigma (arXiv:2505.07818, its code).

    mu = x + v ds - eta^2 score ds / 2, score = -(x - (1 - sigma) x0) / sigma^2, x0 = x - sigma v,
    ds = sigma_next - sigma, s = eta sqrt(-ds): :func:`flow_step` with the spread eta.

    Args:
        sigma: [N] or a number, in (0, 1].
        sigma_next: of the next state, in [0, sigma).
        eta: > 0.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> round(dance_step(0.6, 0.5).std.item(), 6)
        0.094868
    """
    _check_sigmas("dance_step", sigma, sigma_next)
    _check_noise("dance_step", "eta", eta, math.inf, sigma, sigma_next)
    return _sde_step(*_doubles("dance_step", sigma=sigma, sigma_next=sigma_next, eta=eta))


def renoise_step(
    alphas_cumprod: Tensor | float,
    alphas_cumprod_prev: Tensor | float,
    prediction_type: PredictionType = "epsilon",
) -> Step:
    """Back to abar_prev by fresh noise on the predicted x0, as few-step distilled models sample.

    mu = sqrt(abar_prev) x0, s = sqrt(1 - abar_prev); of PSO (arXiv:2410.03190).

    Arguments and errors are those of :func:`ddim_step`.

    Example:
        >>> round(renoise_step(0.5, 0.6).std.item(), 6)
        0.632456
    """
    _check_abar("renoise_step", alphas_cumprod, alphas_cumprod_prev, prediction_type)
    a, p = _doubles(
        "renoise_step", alphas_cumprod=alphas_cumprod, alphas_cumprod_prev=alphas_cumprod_prev
    )
    (x0_x, x0_m), _ = _clean_and_noise("renoise_step", a, prediction_type)
    return Step(p.sqrt() * x0_x, p.sqrt() * x0_m, (1 - p).sqrt())


def _checked_step(
    name: str, step: Step, prediction: Tensor, acc: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, b and s as acc [N], and which steps have a density; those without get 0, 0 and 1."""
    given = Step(
        *(
            per_sample(name, f"step.{field}", numbers, prediction, acc)
            for field, numbers in zip(Step._fields, step, strict=True)
        )
    )
    has_N = given.has_density(acc)
    kept = (torch.where(has_N, x, other) for x, other in zip(given, (0, 0, 1), strict=True))
    return *kept, has_N


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
        [N], or [N, K]; float32, or float64 if a tensor is. Samples whose step has no finite
        density, see :meth:`Step.has_density`, are masked: 0, and no gradient.

    Raises:
        ValueError: a shape, dtype, device or option does not fit, or a constant has requires_grad.

    Example:
        >>> x, eps = torch.tensor([[0.5, -0.3, 0.8, 0.1]]), torch.tensor([[0.2, 0.1, -0.4, 0.6]])
        >>> x_next = torch.tensor([[0.48, -0.25, 0.9, 0.0]])
        >>> round(step_log_probs(ddim_step(0.5, 0.6), eps, x, x_next).item(), 5)
        0.07017
    """
    name = "diffusion.step_log_probs"
    optional = {"unconditional": unconditional}
    check_tensors(name, optional, sample=sample, next_samples=next_samples)
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
    sample_N, scale_N, std_N, has_N = _checked_step(name, step, prediction, acc)
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
    logprobs_NK = torch.where(has_N[:, None], logprobs_NK, 0)
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
    check_tensors("diffusion.step_kl", reference=reference)
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
    _, scale_N, std_N, _ = _checked_step(name, step, prediction, acc)
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
