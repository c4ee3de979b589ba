"""The loss end of preference optimisation and group RL.

Dimension key, the letters that end a tensor's name: N packed tokens, B sequences or samples, P pairs,
G group size, T positions, H hidden, V vocabulary, K choices, E flattened elements. Log-probs are natural
logarithms.
"""

import fastpo.losses as losses
from fastpo import backends
from fastpo.linear import LoRA, TokenStats, linear_logprobs, linear_token_stats

__version__ = "0.1.0"

__all__ = [
    "LoRA",
    "TokenStats",
    "backends",
    "linear_logprobs",
    "linear_token_stats",
    "losses",
]
