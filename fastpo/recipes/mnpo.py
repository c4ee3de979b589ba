"""Multiplayer Nash preference optimisation."""

from __future__ import annotations

from fastpo.data.pairs import best_worst
from fastpo.recipes._recipe import recipe
from fastpo.trainers.rounds import OuterLoop


@recipe(samples=5)
def mnpo(
    loop: OuterLoop,
    *,
    rounds: int = 3,
    eta: float = 0.0075,
    ratio: float = 1 / 3,
    opponents: int = 2,
    history_weights: list[float] | None = None,
) -> None:
    """MNPO (arXiv:2509.23102): INPO against the models of several rounds.

    The authors' code takes mean log-probs per token, this the sums.

    Options:
        rounds: of sampling and training.
        eta: inverse step size.
        ratio: weight of the initial model; the opponents share the rest.
        opponents: models of the last rounds, that of the present one first.
        history_weights: of the opponents; equal if not given.
    """
    for number in loop.rounds(rounds):
        # history0 is the model of this round, history1 that of the one before.
        for i in range(min(number, opponents - 1), 0, -1):
            loop.states.alias(f"history{i}", f"history{i - 1}")
        loop.states.save("history0")
        history = [f"history{i}" for i in range(min(number + 1, opponents))]
        samples = loop.sample()
        pairs = best_worst(loop.rewards(loop.score(samples)), equal="first_two")
        loop.train(
            samples.rows(pairs), "mnpo", ref="initial", history=history, eta=eta, ratio=ratio,
            max_history_t=opponents, history_weights=history_weights,
        )  # fmt: skip
