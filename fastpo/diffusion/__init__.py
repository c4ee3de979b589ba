"""The loss end of diffusion preference optimisation: errors, step log-probs and their losses.

Predictions of a denoiser become one error per sample (:func:`noise_errors`) or one log-density per
denoising step (:func:`step_log_probs`); ``losses`` are short functions of these. ``accumulate``
back-propagates them one sample at a time. Trainers and diffusers come in elsewhere.
"""

from fastpo.diffusion import advantages, data, guidance, losses, targets, weights
from fastpo.diffusion.accumulate import accumulate
from fastpo.diffusion.errors import noise_errors, noise_errors_with_reference
from fastpo.diffusion.steps import (
    Step,
    dance_step,
    ddim_step,
    flow_step,
    renoise_step,
    step_kl,
    step_log_probs,
    wan_step,
)
from fastpo.diffusion.targets import Target

__all__ = [
    "Step",
    "Target",
    "accumulate",
    "advantages",
    "dance_step",
    "data",
    "ddim_step",
    "flow_step",
    "guidance",
    "losses",
    "noise_errors",
    "noise_errors_with_reference",
    "renoise_step",
    "step_kl",
    "step_log_probs",
    "targets",
    "wan_step",
    "weights",
]
