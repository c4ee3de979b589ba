"""REBEL: regression of relative rewards."""

from __future__ import annotations

from fastpo.data.pairs import best_worst
from fastpo.recipes._recipe import recipe
from fastpo.trainers.rounds import OuterLoop


@recipe(samples=2)
def rebel(loop: OuterLoop, *, rounds: int = 3, eta: float = 1.0) -> None:
    """REBEL (arXiv:2404.16767): regression of the log-ratio of two responses to their reward gap.

    The best meets the worst of the model's own responses; the reference is the model that sampled
    them. A batch of the paper is a round here: give a function as ``prompts`` for new prompts.

    Options:
        rounds: of sampling and training.
        eta: step size; 1 for rewards of order one, 1e6 in one of the authors' scripts.
    """
    for _ in loop.rounds(rounds):
        samples = loop.sample()
        rewards = loop.rewards(loop.score(samples))
        rows = samples.rows(best_worst(rewards), scores=rewards)
        loop.train(rows, "rebel", ref="current", eta=eta)
