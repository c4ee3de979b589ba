"""What a denoiser is fitted to, formed inside the error kernel: two scaled tensors, no new one.

``clean`` is x0, ``noise`` epsilon, ``noisy`` x_t = sqrt(abar) x0 + sqrt(1 - abar) epsilon, or, for
flows, (1 - sigma) x0 + sigma epsilon. All have the prediction's shape [N, ...], in any dtype and
layout; ``alphas_cumprod`` is abar of each sample, [N] or one number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.checks import check_tensors
from fastpo.diffusion._inputs import placed


class Target(NamedTuple):
    """first_scale * first + second_scale * second, never formed.

    Attributes:
        first: [N, ...].
        first_scale: [N] or a number per batch [1], None for 1.
        second: [N, ...], or None.
        second_scale: likewise.
    """

    first: Tensor
    first_scale: Tensor | None = None
    second: Tensor | None = None
    second_scale: Tensor | None = None


def _abar(function: str, alphas_cumprod: Tensor | float, like: Tensor) -> Tensor:
    name = f"diffusion.targets.{function}"
    return placed(name, "alphas_cumprod", alphas_cumprod, torch.float64, like.device)


def epsilon(noise: Tensor) -> Target:
    """The noise, for models that predict it.

    Example:
        >>> epsilon(torch.ones(2, 4)).second is None
        True
    """
    check_tensors("diffusion.targets.epsilon", noise=noise)
    return Target(noise)


def sample(clean: Tensor) -> Target:
    """The clean sample, for models that predict x0.

    Example:
        >>> sample(torch.ones(2, 4)).second is None
        True
    """
    check_tensors("diffusion.targets.sample", clean=clean)
    return Target(clean)


def v_prediction(noise: Tensor, clean: Tensor, alphas_cumprod: Tensor | float) -> Target:
    """The velocity sqrt(abar) noise - sqrt(1 - abar) clean (arXiv:2202.00512, appendix D).

    Example:
        >>> target = v_prediction(torch.ones(1, 2), torch.ones(1, 2), 0.64)
        >>> [round(scale.item(), 3) for scale in (target.first_scale, target.second_scale)]
        [0.8, -0.6]
    """
    check_tensors("diffusion.targets.v_prediction", noise=noise, clean=clean)
    abar_N = _abar("v_prediction", alphas_cumprod, noise)
    return Target(noise, abar_N.sqrt(), clean, -(1 - abar_N).sqrt())


def flow(noise: Tensor, clean: Tensor) -> Target:
    """The velocity of a rectified flow, noise - clean (arXiv:2209.03003; arXiv:2403.03206 eq. 13).

    Example:
        >>> flow(torch.ones(1, 2), torch.ones(1, 2)).second_scale
        tensor([-1.])
    """
    check_tensors("diffusion.targets.flow", noise=noise, clean=clean)
    return Target(noise, None, clean, noise.new_full((1,), -1.0, dtype=torch.float32))


def inverted(noisy: Tensor, clean: Tensor, alphas_cumprod: Tensor | float) -> Target:
    """The noise that leads from clean to noisy, (noisy - sqrt(abar) clean) / sqrt(1 - abar).

    Of InPO (arXiv:2503.18454) and SmPO (arXiv:2506.02698), where noisy comes from DDIM inversion.
    abar must be that of the step at which noisy lies, and in float32: in fp16, 1 - abar at the
    first step is 7 % off.

    Example:
        >>> target = inverted(torch.ones(1, 2), torch.ones(1, 2), 0.64)
        >>> [round(scale.item(), 3) for scale in (target.first_scale, target.second_scale)]
        [1.667, -1.333]
    """
    check_tensors("diffusion.targets.inverted", noisy=noisy, clean=clean)
    abar_N = _abar("inverted", alphas_cumprod, noisy)
    return Target(noisy, (1 - abar_N).rsqrt(), clean, -(abar_N / (1 - abar_N)).sqrt())
