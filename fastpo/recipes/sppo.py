"""Self-play preference optimisation."""

from __future__ import annotations

import torch

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
        preferences = loop.preferences(loop.score(samples))
        # 1/2 whatever stands there, nothing for a response that was not compared with any other.
        itself = torch.where(win_rates(preferences).isnan(), torch.nan, 0.5)
        preferences = preferences.double().diagonal_scatter(itself.double(), dim1=1, dim2=2)
        rates = win_rates(preferences, include_self=True)
        rows = samples.rows(best_worst(rates), win_rates=rates)
        loop.train(rows, "sppo", ref="current", beta=beta)
