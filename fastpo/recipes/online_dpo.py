"""Online DPO."""

from __future__ import annotations

from fastpo.data.pairs import first_unless_worse
from fastpo.recipes._recipe import recipe
from fastpo.trainers.rounds import OuterLoop


@recipe(temperature=0.9, max_new_tokens=64)
def online_dpo(loop: OuterLoop, *, loss: str = "dpo", beta: float = 0.1) -> None:
    """Online DPO (OAIF): at every step two responses of the model as it is, the better one chosen.

    The reference is the initial model. One training of ``training``'s length; a checkpoint of it
    can be resumed.

    Options:
        loss: a loss over pairs that has ``beta``.
        beta: of the loss.
    """

    def experience(index, seed):
        samples = loop.respond(index, seed, 2)
        scores = loop.rewards(loop.judge(samples))
        return samples.rows(first_unless_worse(scores), keep_identical=True, scores=scores)

    for _ in loop.rounds(1):
        loop.train_online(experience, loss, beta=beta)
