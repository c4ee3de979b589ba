"""Temporal Self-Rewarding language models."""

from __future__ import annotations

from fastpo.data.self_rewarding import temporal_first_pairs, temporal_second_pairs
from fastpo.recipes._recipe import recipe
from fastpo.recipes.self_rewarding import rubric_judge
from fastpo.trainers.rounds import LATEST, OuterLoop


@recipe(samples=7)
def temporal_self_rewarding(loop: OuterLoop, *, rounds: int = 2, beta: float = 0.1) -> None:
    """Temporal Self-Rewarding (arXiv:2508.06026): rejected from the past, chosen from the future.

    Phase 1 trains a future model on the best responses of the model of the round against the worst
    of the initial one, where these are worse. Phase 2 starts again from the model of the round:
    the future model's best responses are chosen, where they are better. The model of the round
    scores all of them, and is taken to be the reference of both trainings (the paper's notes do
    not say). Without ``score`` the judge is :func:`fastpo.recipes.rubric_judge`.

    Options:
        rounds: of two trainings each.
        beta: of DPO.
    """
    loop.score_function = loop.score_function or rubric_judge(loop.model, loop.tokenizer)
    for _ in loop.rounds(rounds):
        current, initial = loop.sample(), loop.sample(state="initial")
        scores, initial_scores = (loop.rewards(loop.score(s)) for s in (current, initial))
        pairs = temporal_first_pairs(scores, initial_scores)
        loop.train((current + initial).rows(pairs), "dpo", ref=LATEST, beta=beta)
        future = loop.sample()
        future_scores = loop.rewards(loop.score(future, state=LATEST))
        pairs = temporal_second_pairs(scores, future_scores, initial_scores)
        loop.states.load(LATEST)
        loop.train((current + initial + future).rows(pairs), "dpo", ref=LATEST, beta=beta)
