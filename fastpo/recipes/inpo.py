"""Iterative Nash policy optimisation."""

from __future__ import annotations

from fastpo.data.pairs import best_worst
from fastpo.data.rules import compare_by, tournament_pairs
from fastpo.recipes._recipe import recipe
from fastpo.trainers.rounds import OuterLoop


@recipe(samples=8)
def inpo(loop: OuterLoop, *, rounds: int = 3, eta: float = 0.005, ratio: float = 1 / 3) -> None:
    """INPO (arXiv:2407.00617): mirror descent on the game with a KL to the initial model.

    Preferences are played out in a knockout tournament, of rewards the best meets the worst. The
    loss looks at the initial model and at the model of the round.

    Options:
        rounds: of sampling and training.
        eta: inverse step size.
        ratio: the paper's tau / eta, weight of the initial model.
    """
    for _ in loop.rounds(rounds):
        samples = loop.sample()
        scores = loop.score(samples)
        if scores.ndim == 3:
            pairs = tournament_pairs(compare_by(scores), *scores.shape[:2])
        else:
            pairs = best_worst(scores)
        loop.train(
            samples.rows(pairs), "inpo", ref="initial", history=["current"], eta=eta, ratio=ratio
        )
