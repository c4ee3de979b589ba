"""Self-exploring language models."""

from __future__ import annotations

import torch

from fastpo.data.pairs import best_worst
from fastpo.recipes._recipe import recipe
from fastpo.trainers.rounds import OuterLoop


@recipe()
def selm(loop: OuterLoop, *, rounds: int = 3, beta: float = 0.01, alpha: float = 0.001) -> None:
    """SELM (arXiv:2405.19332): DPO with a push away from the model's own greedy response.

    The rows of ``prompts`` have ``chosen`` and ``rejected``. Of these and the greedy response the
    best meets the worst; the reference is the model of the round. The paper trains a first round
    of plain DPO on a quarter of the prompts, and three of SELM on the others.

    Options:
        rounds: of sampling and training.
        beta: of DPO.
        alpha: weight of the push.
    """
    for _ in loop.rounds(rounds):
        samples = loop.sample(1, do_sample=False) + loop.given("chosen", "rejected")
        pairs = best_worst(loop.rewards(loop.score(samples)))
        own = torch.zeros(len(samples.ids), dtype=torch.long)
        loop.train(samples.rows(pairs, extra=own), "selm", ref="current", beta=beta, alpha=alpha)
