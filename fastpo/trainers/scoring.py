"""What a scorer gives, as a checked tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpo.trainers.sampling import Prompt, Samples

# Score(prompts [B], responses [B][K]) gives rewards [B, K] or preferences [B, K, K].
Score = Callable[[list[Prompt], list[list[str]]], Tensor]


class RoundError(RuntimeError):
    """A round cannot go on: no pairs, scores of another shape, a run of other settings."""


def as_scores(found: Any, samples: Samples) -> Tensor:
    """Rewards [B, K] or preferences [B, K, K] as floats on the CPU, from arrays or nested lists.

    Raises:
        RoundError: they are no numbers, or not one per response or pair of responses.
    """
    count = len(samples.ids), len(samples.ids[0])
    expected = f"{list(count)} rewards or {[*count, count[1]]} preferences"
    try:
        scores = _tensor(found)
    except (TypeError, ValueError, RuntimeError) as error:
        remedy = "Give numbers, NaN for a response without a score."
        got = f"a {type(found).__name__} that is no array ({error})"
        raise RoundError(f"score: expected {expected}, got {got}. {remedy}") from error
    if tuple(scores.shape) not in (count, (*count, count[1])):
        raise RoundError(f"score: expected {expected}, got {list(scores.shape)}.")
    return scores if scores.is_floating_point() else scores.double()


def _tensor(scores: Any) -> Tensor:
    if isinstance(scores, (list, tuple)) and any(hasattr(part, "shape") for part in scores):
        return torch.stack([torch.as_tensor(part).detach().cpu() for part in scores])
    return torch.as_tensor(scores).detach().cpu()
