"""Weights and densities of timesteps: functions of the noise level, or of draws of the caller's.

Weights are in float32, or float64 for float64 levels; none carries a gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fastpo.checks import check_tensors
from fastpo.ops._check import fail


def _floats(numbers: Tensor) -> Tensor:
    return numbers.detach().to(torch.promote_types(numbers.dtype, torch.float32))


def min_snr(
    alphas_cumprod: Tensor,
    gamma: float = 5.0,
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
) -> Tensor:
    """Min-SNR weights of a timestep's error: min(snr, gamma) / snr, for v / (snr + 1).

    snr = abar / (1 - abar) (arXiv:2303.09556, section 3.4). At snr 0, the last step of a
    zero-terminal schedule, the weight is the limit, 1 (0 for v), where codes divide 0 by 0.

    Args:
        alphas_cumprod: abar in [0, 1], any shape.
        gamma: > 0.
        prediction_type: what the error is of.

    Returns:
        Weights, shaped like ``alphas_cumprod``.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> min_snr(torch.tensor([0.99, 0.5, 0.0]))
        tensor([0.0505, 1.0000, 1.0000])
    """
    check_tensors("diffusion.weights.min_snr", alphas_cumprod=alphas_cumprod)
    name = "diffusion.weights.min_snr"
    if not 0 < gamma < math.inf:
        raise fail(name, "gamma", "a positive finite number", repr(gamma), "The paper has 5.")
    if prediction_type not in ("epsilon", "v_prediction"):
        remedy = "Flows go with sd3."
        raise fail(
            name, "prediction_type", "epsilon or v_prediction", repr(prediction_type), remedy
        )
    abar = _floats(alphas_cumprod)
    held = gamma * (1 - abar)
    return (held / abar).clamp(max=1) if prediction_type == "epsilon" else torch.minimum(abar, held)


def sd3(sigmas: Tensor, scheme: Literal["sigma_sqrt", "cosmap", "none"]) -> Tensor:
    """Weights of a flow's error at noise level sigma (arXiv:2403.03206, section 3.1).

    ``sigma_sqrt`` sigma^-2, ``cosmap`` 2 / (pi (1 - 2 sigma + 2 sigma^2)), ``none`` 1; names as in
    diffusers.

    Args:
        sigmas: in (0, 1], any shape.
        scheme: one of the three.

    Returns:
        Weights, shaped like ``sigmas``.

    Raises:
        ValueError: ``scheme`` is none of these.

    Example:
        >>> sd3(torch.tensor([0.25, 0.5]), "sigma_sqrt")
        tensor([16.,  4.])
    """
    check_tensors("diffusion.weights.sd3", sigmas=sigmas)
    sigmas = _floats(sigmas)
    if scheme == "sigma_sqrt":
        return sigmas.square().reciprocal()
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas.square()))
    if scheme == "none":
        return torch.ones_like(sigmas)
    expected = "sigma_sqrt, cosmap or none"
    raise fail("diffusion.weights.sd3", "scheme", expected, repr(scheme), "Pick one of them.")


def logit_normal(normal: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Noise levels with the logit-normal density of SD3: sigmoid(mean + std n).

    arXiv:2403.03206, section 3.1; DSO (arXiv:2503.22677) has mean 1, std 1. Schedules take them as
    shares of their steps.

    Args:
        normal: draws of the standard normal distribution, any shape.
        mean: of the logit.
        std: of the logit.

    Returns:
        Levels in (0, 1), shaped like ``normal``.

    Example:
        >>> logit_normal(torch.tensor([-1.0, 0.0]), mean=1.0)
        tensor([0.5000, 0.7311])
    """
    check_tensors("diffusion.weights.logit_normal", normal=normal)
    return torch.sigmoid(mean + std * _floats(normal))


def mode(uniform: Tensor, scale: float = 1.29) -> Tensor:
    """Noise levels with SD3's density of heavy tails: 1 - u - k (cos^2(pi u / 2) - 1 + u).

    arXiv:2403.03206, section 3.1. k = 0 is uniform.

    Args:
        uniform: draws of the uniform distribution on [0, 1], any shape.
        scale: k.

    Returns:
        Levels in [0, 1], shaped like ``uniform``.

    Example:
        >>> mode(torch.tensor([0.1, 0.5]))
        tensor([0.8026, 0.5000])
    """
    check_tensors("diffusion.weights.mode", uniform=uniform)
    u = _floats(uniform)
    return 1 - u - scale * ((math.pi / 2 * u).cos().square() - 1 + u)


def turbo_timesteps(timesteps: Tensor) -> Tensor:
    """Timesteps of SDXL-Turbo's four steps: 250 (t mod 4) + 249.

    Of the Diffusion-DPO code, where the schedule is one of zero terminal SNR.

    Args:
        timesteps: int draws from [0, 1000), any shape.

    Example:
        >>> turbo_timesteps(torch.tensor([0, 5, 998, 999]))
        tensor([249, 499, 749, 999])
    """
    check_tensors("diffusion.weights.turbo_timesteps", timesteps=timesteps)
    return 250 * (timesteps % 4) + 249
