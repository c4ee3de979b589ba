"""Rules of particular methods that turn scores or comparisons into pairs; see also ``pairs``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fastpo.data._checks import (
    bools,
    choice,
    fail,
    first_min,
    real,
    scores_of,
    square,
)
from fastpo.data.pairs import Pairs, all_pairs_where, pairs_where, rank_pairs

Compare = Callable[[Tensor, Tensor], Tensor]


def dno_pairs(rates: Tensor) -> Pairs:
    """All pairs of a prompt with the soft label sigmoid(r1 - r2) of DNO (arXiv:2404.03715, Alg. 1).

    Args:
        rates: [B, K] win rates r_t of the responses, for example of
            :func:`~fastpo.data.win_rates.sampled_win_rates`.

    Returns:
        Pairs with ``label``. A pair has no better side beforehand: "chosen" is the smaller column,
        and a label below 1/2 says that it loses.

    Raises:
        ValueError: the shape does not fit.

    Example:
        >>> dno_pairs(torch.tensor([[0.8, 0.3], [0.6, 0.65]])).label
        tensor([0.6225, 0.4875])
    """
    rates_BK = scores_of("dno_pairs", rates, "rates")
    gaps_BKK = rates_BK[:, :, None] - rates_BK[:, None, :]
    return all_pairs_where((~gaps_BKK.isnan()).triu(1), torch.sigmoid(gaps_BKK))


def dno_prct_pairs(
    scores: Tensor,
    is_student: Tensor,
    min_score: float = 5.0,
    gap: float = 2.0,
    student_gap: float = 1.0,
    is_negative: Tensor | None = None,
) -> Pairs:
    """All clear pairs of graded responses, DNO-Prct (arXiv:2404.03715, Alg. 2 and section 5).

    The chosen response has a score of at least ``min_score`` and is ahead by at least ``gap``, or
    by ``student_gap`` if the policy itself wrote it: what it can do already is learned from finer
    differences.

    Args:
        scores: [B, K] grades, 1 to 6 in the paper.
        is_student: bool [B, K] or [K], True for responses of the policy, False for the teacher's.
        min_score: lowest grade of a chosen response.
        gap: least difference of grades.
        student_gap: the same where the chosen response is the policy's.
        is_negative: bool [B, K]; responses that are never chosen and are rejected whatever their
            grade, in the paper those with many repeated n-grams.

    Returns:
        Pairs, in the order of prompt, chosen and rejected.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> dno_prct_pairs(torch.tensor([[6, 5, 4]]), torch.tensor([False, True, True]))[1:3]
        (tensor([0, 1]), tensor([2, 2]))
    """
    scores_BK = scores_of("dno_prct_pairs", scores)
    student_BK = bools("dno_prct_pairs", "is_student", is_student, scores_BK.shape)
    negative_BK = torch.zeros_like(student_BK)
    if is_negative is not None:
        negative_BK = bools("dno_prct_pairs", "is_negative", is_negative, scores_BK.shape)
    needed_BK = torch.where(student_BK, student_gap, gap).to(scores_BK.dtype)
    gaps_BKK = scores_BK[:, :, None] - scores_BK[:, None, :]
    is_clear_BKK = (gaps_BKK > 0) & (gaps_BKK >= needed_BK[:, :, None])
    may_win_BK = (scores_BK >= min_score) & ~negative_BK
    return all_pairs_where(may_win_BK[:, :, None] & (is_clear_BKK | negative_BK[:, None, :]))


def compare_by(preferences: Tensor) -> Compare:
    """A judge for :func:`tournament_pairs` that looks its answers up in matrices [B, K, K].

    Example:
        >>> judge = compare_by(torch.tensor([[[0.5, 0.9], [0.1, 0.5]]]))
        >>> judge(torch.tensor([[1]]), torch.tensor([[0]]))
        tensor([[0.1000]])
    """
    table_BKK = real("compare_by", "preferences", preferences, "B K K")
    square("compare_by", "preferences", table_BKK)

    def compare(first_BM: Tensor, second_BM: Tensor) -> Tensor:
        prompt_B1 = torch.arange(len(table_BKK), device=table_BKK.device)[:, None]
        return table_BKK[prompt_B1, first_BM, second_BM]

    return compare


def tournament_pairs(compare: Compare, prompts: int, responses: int = 8) -> Pairs:
    """Best and worst response by a knockout, INPO with a preference model (arXiv:2407.00617).

    Neighbours meet; then winners meet winners and losers meet losers, until one of each is left.
    The pair of the two is kept only if the winner beats the loser as well. That takes 11
    comparisons for 8 responses in place of 28; in a tie the first (smaller column) wins.

    Args:
        compare: a judge: given columns [B, M] of two responses of each prompt, the probabilities
            [B, M] that the first beats the second. A NaN drops the prompt. See :func:`compare_by`.
        prompts: B.
        responses: K, a power of two, at least 2.

    Returns:
        Pairs, at most one per prompt.

    Raises:
        ValueError: ``responses`` is not a power of two.

    Example:
        >>> scores = torch.tensor([[1.0, 2.0, 4.0, 3.0]])
        >>> judge = lambda i, j: torch.sigmoid(scores.gather(1, i) - scores.gather(1, j))
        >>> tournament_pairs(judge, prompts=1, responses=4)[:3]
        (tensor([0]), tensor([2]), tensor([0]))
    """
    if responses < 2 or responses & (responses - 1):
        remedy = "Leave some out, or take best_worst with win rates."
        expected = "a power of two >= 2"
        raise fail("tournament_pairs", "responses", expected, f"{responses}", remedy)
    unknown = []

    def play(columns_BM: Tensor) -> tuple[Tensor, Tensor]:
        first_BM, second_BM = columns_BM[:, ::2], columns_BM[:, 1::2]
        chance_BM = compare(first_BM, second_BM).to(columns_BM.device)
        unknown.append(chance_BM.isnan().any(1))
        first_wins_BM = chance_BM >= 0.5
        winners_BM = torch.where(first_wins_BM, first_BM, second_BM)
        return winners_BM, torch.where(first_wins_BM, second_BM, first_BM)

    winners_BM, losers_BM = play(torch.arange(responses).expand(prompts, responses))
    while winners_BM.shape[1] > 1:
        winners_BM, losers_BM = play(winners_BM)[0], play(losers_BM)[1]
    beats_B = compare(winners_BM, losers_BM).squeeze(1).to(winners_BM.device) > 0.5
    keep_B = beats_B & ~torch.stack(unknown).any(0)
    return pairs_where(keep_B, winners_BM.squeeze(1), losers_BM.squeeze(1))


def upo_pairs(scores: Tensor) -> Pairs:
    """All pairs among the two best and the two worst responses, UPO (arXiv:2409.11212).

    As in the authors' code: up to six pairs per prompt, the best against the second best included;
    all pairs if there are at most four responses; none of equal scores.

    Args:
        scores: [B, K] rewards, the reference answer among the responses.

    Returns:
        Pairs, in the order of prompt, rank of chosen and rank of rejected.

    Raises:
        ValueError: the shape does not fit.

    Example:
        >>> upo_pairs(torch.tensor([[5.0, 1.0, 4.0, 2.0, 3.0]]))[1:3]
        (tensor([0, 0, 0, 2, 2, 3]), tensor([2, 3, 1, 3, 1, 1]))
    """
    scores_BK = scores_of("upo_pairs", scores)
    known_B1 = (~scores_BK.isnan()).sum(1, keepdim=True)
    rank_K = torch.arange(scores_BK.shape[1], device=scores_BK.device)
    kept_BK = (rank_K < 2) | (rank_K >= known_B1 - 2)
    return rank_pairs(scores_BK, kept_BK[:, :, None] & kept_BK[:, None, :])


def anchor_pairs(scores: Tensor, against: Literal["worst", "all"] = "worst") -> Pairs:
    """A teacher's answer, the anchor, against the policy's own samples.

    Args:
        scores: [B, K] scores of the samples, given with the anchor in view. The anchor needs none.
        against: the ``worst`` sample, or ``all`` scored samples.

    Returns:
        Pairs; columns of [anchor, samples]: the anchor is column 0 and always chosen. For pairs
        among the samples take :func:`~fastpo.data.pairs.ranked_pairs`.

    Raises:
        ValueError: the shape does not fit, or ``against`` is unknown.

    Example:
        >>> anchor_pairs(torch.tensor([[4.0, 1.0, 3.0]]))[:3]
        (tensor([0]), tensor([0]), tensor([2]))

    Experimental: from the abstract of PU-RL distillation (arXiv:2601.20687); its pairing was not
    read in the paper.
    """
    choice("anchor_pairs", "against", against, ("worst", "all"))
    scores_BK = scores_of("anchor_pairs", scores)
    known_BK = ~scores_BK.isnan()
    if against == "worst":
        rejected_B = 1 + first_min(scores_BK)
        return pairs_where(known_BK.any(1), torch.zeros_like(rejected_B), rejected_B)
    prompt, sample = known_BK.nonzero().unbind(1)
    return Pairs(prompt, torch.zeros_like(sample), 1 + sample)
