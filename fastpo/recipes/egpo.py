"""Extragradient preference optimisation."""

from __future__ import annotations

import torch

from fastpo.data.pairs import Pairs
from fastpo.recipes._recipe import recipe
from fastpo.trainers.online import Extragradient
from fastpo.trainers.rounds import OuterLoop
from fastpo.trainers.states import CURRENT


@recipe()
def egpo(
    loop: OuterLoop,
    *,
    beta: float = 0.1,
    pair_temperature: float = 2.0,
    pair_top_k: int = 10,
    convention: str = "averaged",
    extragradient: bool = True,
) -> None:
    """EGPO (arXiv:2503.08942): regression to win rates against an opponent one half step ahead.

    At every step two responses, and a third one that both are compared with; the reference is the
    initial model. Steps come in pairs: the first is undone, and its model writes the responses of
    the second. Half of ``training``'s steps therefore move the model.

    Options:
        beta: of the loss.
        pair_temperature: of the two responses; the third is sampled as the loop does.
        pair_top_k: likewise.
        convention: ``averaged`` log-probs, as in the authors' code, or ``summed``.
        extragradient: False for plain online IPO, every step of which counts.
    """
    steps = Extragradient()

    def experience(index, seed):
        ahead = CURRENT if steps.half is None else steps.half
        wide = {"temperature": pair_temperature, "top_k": pair_top_k}
        samples = loop.respond(index, seed, 2, ahead, **wide)
        samples += loop.respond(index, seed + 1, 1, ahead)
        # Columns 0 and 1 against 2.
        rates = loop.preferences(loop.judge(samples))[:, :, 2]
        first = torch.zeros(len(index), dtype=torch.long)
        pairs = Pairs(torch.arange(len(index)), first, first + 1)
        pairs = pairs.select(~rates[:, :2].isnan().any(1))
        return samples.rows(pairs, keep_identical=True, win_rates=rates)

    for _ in loop.rounds(1):
        callbacks = [steps] if extragradient else []
        loop.train_online(experience, "egpo", callbacks, beta=beta, convention=convention)
