"""The loss end of preference optimisation and group RL.

Dimension key, the letters that end a tensor's name: N packed tokens, B sequences or samples, P
pairs, G group size, T positions, H hidden, V vocabulary, K choices, E flattened elements. Log-probs
are natural logarithms.
"""

from fastpo import backends, losses, metrics, weights
from fastpo.divergence import divergence, linear_divergence
from fastpo.linear import LoRA, TokenStats, linear_logprobs, linear_token_stats
from fastpo.logits import logprobs
from fastpo.nll import linear_nll
from fastpo.sequences import (
    sequence_counts,
    sequence_log_ratios,
    sequence_means,
    sequence_sums,
)

__version__ = "0.1.0"

__all__ = [
    "LoRA",
    "TokenStats",
    "backends",
    "divergence",
    "linear_divergence",
    "linear_logprobs",
    "linear_nll",
    "linear_token_stats",
    "logprobs",
    "losses",
    "metrics",
    "sequence_counts",
    "sequence_log_ratios",
    "sequence_means",
    "sequence_sums",
    "weights",
]
