"""Direct Nash optimisation, in its exact and in its practical form."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastpo.data.rules import dno_pairs, dno_prct_pairs
from fastpo.recipes._recipe import recipe
from fastpo.trainers.rounds import OuterLoop


@recipe(samples=5, temperature=0.7, top_p=0.95)
def dno(loop: OuterLoop, *, rounds: int = 3, beta: float = 0.1) -> None:
    """DNO (arXiv:2404.03715, Algorithm 1): all pairs, labelled by win rates against the policy.

    The reference is the model of the round.

    Options:
        rounds: of sampling and training.
        beta: the paper's eta.
    """
    for _ in loop.rounds(rounds):
        samples = loop.sample()
        rates = loop.rewards(loop.preferences(loop.score(samples)))
        rows = samples.rows(dno_pairs(rates), win_rates=rates)
        loop.train(rows, "dno", ref="current", beta=beta)


@recipe(samples=5, temperature=0.7, top_p=0.95)
def dno_prct(
    loop: OuterLoop,
    *,
    rounds: int = 3,
    teacher: str | None = None,
    min_score: float = 5.0,
    gap: float = 2.0,
    student_gap: float = 1.0,
    replay: Sequence[float] = (0.3, 0.15),
    beta: float = 0.1,
) -> None:
    """DNO-Prct (arXiv:2404.03715, Algorithm 2): DPO on all clear pairs, with a teacher's answers.

    The reference is the model of the round. Pairs of earlier rounds are trained on again, with
    log-probs of the new reference.

    Options:
        rounds: of sampling and training.
        teacher: field of the rows of ``prompts`` with a stronger model's response; None for none.
        min_score: lowest score of a chosen response, 1 to 6 in the paper.
        gap: least difference of scores.
        student_gap: the same where the chosen response is the model's own.
        replay: rows of the last round, the one before it, ..., as shares of them.
        beta: of DPO.
    """
    for _ in loop.rounds(rounds):
        samples = loop.sample()
        is_student = torch.ones(loop.samples, dtype=torch.bool)
        if teacher:
            samples += loop.given(teacher)
            is_student = torch.cat([is_student, torch.tensor([False])])
        scores = loop.rewards(loop.score(samples))
        pairs = dno_prct_pairs(scores, is_student, min_score, gap, student_gap)
        rows = samples.rows(pairs) + loop.replay(replay)
        loop.train(rows, "dpo", ref="current", beta=beta)
