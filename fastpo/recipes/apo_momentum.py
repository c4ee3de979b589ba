"""Accelerated preference optimisation: momentum over rounds."""

from __future__ import annotations

from fastpo.data.pairs import best_worst
from fastpo.recipes._recipe import recipe
from fastpo.trainers.rounds import OuterLoop
from fastpo.trainers.states import restore


@recipe()
def apo_momentum(
    loop: OuterLoop, *, rounds: int = 3, alpha: float = 0.3, beta: float = 0.1
) -> None:
    """Iterative DPO with extrapolated parameters (after arXiv:2410.06293).

    A round trains from theta to theta_hat, with the model of the round as reference; the next one
    starts from theta_hat + alpha (theta_hat - theta_hat of the round before), the initial model
    being the first theta_hat. ``alpha`` 0 is iterative DPO.

    Experimental: of the paper the abstract was read; its alpha and what it does in the first round
    are not known.

    Options:
        rounds: of sampling and training.
        alpha: extrapolation, 0 <= alpha < 1.
        beta: of DPO.
    """
    for number in loop.rounds(rounds):
        loop.states.alias("before", "trained" if number else "initial")
        samples = loop.sample()
        pairs = best_worst(loop.rewards(loop.score(samples)))
        loop.train(samples.rows(pairs), "dpo", ref="current", beta=beta)
        loop.states.save("trained")
        trained, before = loop.states.get("trained"), loop.states.get("before")
        ahead = {name: t + alpha * (t - before[name]) for name, t in trained.items()}
        restore(loop.model, ahead)
