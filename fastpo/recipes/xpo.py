"""Exploratory preference optimisation."""

from __future__ import annotations

import torch

from fastpo.data.pairs import first_unless_worse
from fastpo.recipes._recipe import recipe
from fastpo.trainers.rounds import OuterLoop


@recipe(temperature=0.9, max_new_tokens=64)
def xpo(loop: OuterLoop, *, beta: float = 0.1, alpha: float = 1e-5) -> None:
    """XPO (arXiv:2405.21046): online DPO against a response of the initial model, with optimism.

    Options:
        beta: of DPO.
        alpha: weight of the push away from the initial model's response.
    """

    def experience(index, seed):
        samples = loop.respond(index, seed, 1) + loop.respond(index, seed + 1, 1, "initial")
        scores = loop.rewards(loop.judge(samples))
        initial = torch.ones(len(index), dtype=torch.long)
        return samples.rows(
            first_unless_worse(scores), extra=initial, keep_identical=True, scores=scores
        )

    for _ in loop.rounds(1):
        loop.train_online(experience, "xpo", beta=beta, alpha=alpha)
