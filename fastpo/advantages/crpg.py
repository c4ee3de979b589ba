"""Rewards that judges and a baseline calibrate."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.advantages._common import fail, floats
from fastpo.checks import check_tensors


def crpg_rewards(
    scores: Tensor, baseline_scores: Tensor, passed: Tensor, kl: Tensor, kl_max: float
) -> Tensor:
    """Calibrated, regularised rewards of CGPO's policy gradient.

    passed * sigmoid(r - r_0) * max(0, 1 - kl / kl_max)  (arXiv:2409.20370).

    Args:
        scores: rewards r, any shape.
        baseline_scores: rewards r_0 of a baseline answer to the same prompt.
        passed: bool, whether every judge passes the response.
        kl: log p - log ref of each response, in nats.
        kl_max: kl at which the reward is 0, > 0; infinity switches it off.

    Returns:
        The shape of ``scores``.

    Raises:
        ValueError: shapes do not fit or kl_max is out of range.

    Example:
        >>> crpg_rewards(torch.tensor([1.0, 0.2]), torch.tensor([0.3, 0.3]),
        ...              torch.tensor([True, False]), torch.tensor([2.0, 8.0]), kl_max=10.0)
        tensor([0.5346, 0.0000])
    """
    check_tensors(
        "advantages.crpg_rewards",
        scores=scores,
        baseline_scores=baseline_scores,
        passed=passed,
        kl=kl,
    )
    if not kl_max > 0:
        raise fail("crpg_rewards", "kl_max", "a number > 0", kl_max, "Infinity is no limit.")
    tensors = {"baseline_scores": baseline_scores, "passed": passed, "kl": kl}
    for name, tensor in tensors.items():
        if tensor.shape != scores.shape:
            expected, got = f"{list(scores.shape)} as scores", list(tensor.shape)
            raise fail("crpg_rewards", name, expected, got, "Expand it to the responses.")
    scores, baseline_scores, kl = floats(scores, baseline_scores, kl)
    rewards = torch.sigmoid(scores - baseline_scores) * (1 - kl / kl_max).clamp(min=0)
    return torch.where(passed, rewards, 0.0)
