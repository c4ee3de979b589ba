"""Curry-DPO: easy pairs first, each stage from the model of the last."""

from __future__ import annotations

from fastpo.data.curricula import curry_stages
from fastpo.recipes._recipe import recipe
from fastpo.trainers.rounds import OuterLoop
from fastpo.trainers.scoring import RoundError
from fastpo.trainers.states import CURRENT


@recipe(samples=4)
def curry_dpo(loop: OuterLoop, *, stages: int = 3, beta: float = 0.1) -> None:
    """Curry-DPO, later Curri-DPO (arXiv:2403.07230): a prompt's pairs from easy to hard, by DPO.

    The best of a prompt's responses against the worst, then against the second worst, and so on;
    the model that a stage ends with is the reference of the next, whose optimiser is new. The
    paper's responses come with its data; here they are the model's own.

    Options:
        stages: of training, each on one pair of every prompt; fewer than ``samples``.
        beta: of the loss.
    """
    for _ in loop.rounds(1):
        samples = loop.sample()
        found = curry_stages(loop.rewards(loop.score(samples)), stages)
        counts = [pairs.num_pairs for pairs in found]
        if not all(counts):
            remedy = "Take more samples than stages; only scores that differ make a pair."
            raise RoundError(f"stages: expected pairs in each, got {counts}. {remedy}")
        for pairs in found:
            loop.train(samples.rows(pairs), "dpo", ref=CURRENT, beta=beta)
