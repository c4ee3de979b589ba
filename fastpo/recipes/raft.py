"""Reward-ranked fine-tuning."""

from __future__ import annotations

from fastpo.data.selection import best_of_n, top_fraction
from fastpo.recipes._recipe import recipe
from fastpo.trainers.rounds import OuterLoop


@recipe(samples=1)
def raft(loop: OuterLoop, *, rounds: int = 3, fraction: float | None = 0.2) -> None:
    """RAFT (arXiv:2304.06767): fine-tuning on the best of the model's own responses.

    Options:
        rounds: of sampling and training.
        fraction: of all responses to keep, by reward; None for the best of the K of each prompt.
    """
    for _ in loop.rounds(rounds):
        samples = loop.sample()
        rewards = loop.rewards(loop.score(samples))
        kept = best_of_n(rewards) if fraction is None else top_fraction(rewards, fraction)
        loop.fit(samples.rows_of(kept))
