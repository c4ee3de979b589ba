"""Self-play preference optimisation."""

from __future__ import annotations

from fastpo.data.pairs import best_worst
from fastpo.data.win_rates import win_rates
from fastpo.recipes._recipe import recipe
from fastpo.trainers.rounds import OuterLoop


@recipe(samples=5)
def sppo(loop: OuterLoop, *, rounds: int = 3, beta: float = 0.001) -> None:
    """SPPO (arXiv:2405.00675): regression of log-ratios to win rates over the own responses.

    Best against worst by win rate, a response's comparison with itself counted as 1/2; the
    reference is the model of the round. Rewards as scores stand for Bradley-Terry preferences.

    Options:
        rounds: of sampling and training.
        beta: of the loss; log-ratios are asked for of (win rate - 1/2) / beta.
    """
    for _ in loop.rounds(rounds):
        samples = loop.sample()
        rates = win_rates(loop.preferences(loop.score(samples)), include_self=True)
        rows = samples.rows(best_worst(rates), win_rates=rates)
        loop.train(rows, "sppo", ref="current", beta=beta)
