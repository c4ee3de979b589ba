"""What to measure of a policy: rankings, implicit rewards, diagnostics. No gradient, pure torch.

Results are tensors on the device of the inputs, float32 or, for float64 inputs, float64; nothing
waits for the device. Log-probs are in nats.
"""

from fastpo.metrics.diagnostics import (
    bhattacharyya_angle,
    bhattacharyya_angle_of,
    linear_separability,
    rlhs_utility,
    tail_exponent,
)
from fastpo.metrics.rankings import (
    did_entropy,
    ideal_log_ratios,
    pair_difficulty,
    ranking_accuracy,
    reward_accuracy,
)

__all__ = [
    "bhattacharyya_angle",
    "bhattacharyya_angle_of",
    "did_entropy",
    "ideal_log_ratios",
    "linear_separability",
    "pair_difficulty",
    "ranking_accuracy",
    "reward_accuracy",
    "rlhs_utility",
    "tail_exponent",
]
