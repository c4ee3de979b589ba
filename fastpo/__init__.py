"""The loss end of preference optimisation and group RL.

Dimension key, the letters that end a tensor's name: N packed tokens, B sequences or samples, P
pairs, G group size, T positions, H hidden, V vocabulary, K choices, E flattened elements. Log-probs
are natural logarithms.
"""

from fastpo import _lazy, advantages, backends, diffusion, losses, metrics, surrogates, weights
from fastpo.advantages import group_advantages
from fastpo.diffusion import noise_errors, step_log_probs
from fastpo.divergence import divergence, linear_divergence
from fastpo.groups import Groups, group_stats
from fastpo.linear import LoRA, TokenStats, linear_logprobs, linear_token_stats
from fastpo.logits import logprobs
from fastpo.nll import linear_nll
from fastpo.sequences import (
    sequence_counts,
    sequence_log_ratios,
    sequence_means,
    sequence_sums,
)
from fastpo.surrogates import policy_loss

__version__ = "0.1.0"

__getattr__ = _lazy.submodules(__name__)  # data, recipes, trainers, methods, ...

__all__ = [
    "Groups",
    "LoRA",
    "TokenStats",
    "advantages",
    "backends",
    "diffusion",
    "divergence",
    "group_advantages",
    "group_stats",
    "linear_divergence",
    "linear_logprobs",
    "linear_nll",
    "linear_token_stats",
    "logprobs",
    "losses",
    "metrics",
    "noise_errors",
    "policy_loss",
    "sequence_counts",
    "sequence_log_ratios",
    "sequence_means",
    "sequence_sums",
    "step_log_probs",
    "surrogates",
    "weights",
]
