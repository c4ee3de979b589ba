"""Iterative DPO."""

from __future__ import annotations

from typing import Literal

from fastpo.data.pairs import best_worst
from fastpo.recipes._recipe import recipe
from fastpo.trainers.rounds import OuterLoop


@recipe()
def iterative_dpo(
    loop: OuterLoop,
    *,
    rounds: int = 3,
    reference: Literal["initial", "current"] = "initial",
    loss: str = "dpo",
    beta: float = 0.1,
) -> None:
    """Iterative DPO: best against worst of the model's own responses, round by round.

    Options:
        rounds: of sampling and training.
        reference: ``initial``, the model as it came, or ``current``, the one that sampled.
        loss: a loss over pairs that has ``beta``.
        beta: of the loss.
    """
    for _ in loop.rounds(rounds):
        samples = loop.sample()
        pairs = best_worst(loop.rewards(loop.score(samples)))
        loop.train(samples.rows(pairs), loss, ref=reference, beta=beta)
