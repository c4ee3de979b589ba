"""The order in which pairs are learned, splits by difficulty, and replay of earlier rounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from fastpo.data._checks import at_least, choice, fail, ranking, real, scores_of, share
from fastpo.data.pairs import Pairs, pairs_where, ranked_pairs


def stages_by_gap(gaps: Tensor, stages: int = 3) -> list[Tensor]:
    """Indices of pairs in stages of equal size, the largest gap (easiest) first.

    Args:
        gaps: [P] score of chosen minus score of rejected; NaN is left out.
        stages: number of stages; the last takes what does not divide.

    Returns:
        Int64 indices of each stage, largest gap first, equal gaps in the order of pairs.

    Raises:
        ValueError: the shape does not fit, or there are no stages.

    Example:
        >>> stages_by_gap(torch.tensor([0.9, 0.1, 0.4, 0.7, 0.2, 0.5]))
        [tensor([0, 3]), tensor([5, 2]), tensor([4, 1])]
    """
    at_least("stages_by_gap", "stages", stages, 1)
    gaps_P = real("stages_by_gap", "gaps", gaps, "P")
    order = ranking(gaps_P[None])[0][: int((~gaps_P.isnan()).sum())]
    size = len(order) // stages
    ends = [size * i for i in range(stages)] + [len(order)]
    return [order[a:b] for a, b in pairwise(ends)]


def curry_stages(
    scores: Tensor,
    stages: int = 3,
    stage_by: Literal["rank_pair", "gap_quantile"] = "rank_pair",
    generator: torch.Generator | None = None,
) -> list[Pairs]:
    """Easy to hard pairs in stages: Curry-DPO, later Curri-DPO (arXiv:2403.07230).

    The model that a stage ends with is the reference of the next, which has a new optimiser, as
    ``fastpo.recipes.curry_dpo`` does it. ``rank_pair``, the paper's, takes best against worst in
    stage 0, best against the second worst in stage 1, and so on: for four responses (1, 4), (1, 3),
    (1, 2). ``gap_quantile``, of a re-implementation, sorts the pairs of best and each other
    response of all prompts by their gap (:func:`stages_by_gap`).

    Args:
        scores: [B, K].
        stages: number of stages.
        stage_by: which of the two.
        generator: shuffles the pairs inside each stage, on the CPU; not shuffled without one.

    Returns:
        Pairs of each stage. Pairs of equal scores are dropped; with ``rank_pair`` a prompt with
        fewer than ``stages + 1`` scores is left out of the late stages.

    Raises:
        ValueError: the shape does not fit, or an option is out of range.

    Example:
        >>> stages = curry_stages(torch.tensor([[0.1, 0.9, 0.3, 0.8]]))
        >>> [(s.chosen.item(), s.rejected.item()) for s in stages]
        [(1, 0), (1, 2), (1, 3)]
    """
    choice("curry_stages", "stage_by", stage_by, ("rank_pair", "gap_quantile"))
    at_least("curry_stages", "stages", stages, 1)
    scores_BK = scores_of("curry_stages", scores)
    if stage_by == "gap_quantile":
        pairs = ranked_pairs(scores_BK, "best_vs_rest")
        found = [pairs.select(i) for i in stages_by_gap(pairs.gaps(scores_BK), stages)]
    else:
        found = [_best_against(scores_BK, place) for place in range(stages)]
    if generator is None:
        return found
    return [s.select(torch.randperm(s.num_pairs, generator=generator)) for s in found]


def _best_against(scores_BK: Tensor, place: int) -> Pairs:
    """The best of each prompt against the worst (place 0), the second worst (1), ..."""
    order_BK = ranking(scores_BK)
    rank_B = (~scores_BK.isnan()).sum(1) - 1 - place
    rejected_B = order_BK.gather(1, rank_B.clamp(min=0)[:, None]).squeeze(1)
    chosen_B = order_BK[:, 0]
    top_B, bottom_B = (scores_BK.gather(1, c[:, None]).squeeze(1) for c in (chosen_B, rejected_B))
    return pairs_where(top_B > bottom_B, chosen_B, rejected_B)


def split_by_gap(
    gaps: Tensor, threshold: float | None = None, quantile: float | None = None
) -> tuple[Tensor, Tensor]:
    """Easy and hard pairs by the gap of their rewards: Mixed PO (arXiv:2403.19443).

    Easy pairs, whose gap is above the threshold, are for DPO; the prompts of the others for online
    RL with the DPO model as reference.

    Args:
        gaps: [P] reward of chosen minus that of rejected; NaN is in neither part.
        threshold: strict lower bound of easy.
        quantile: in its place, the quantile of the gaps that is the threshold.

    Returns:
        Int64 indices of the easy and of the hard pairs, in the order of pairs.

    Raises:
        ValueError: the shape does not fit, or not exactly one of the two is given.

    Example:
        >>> split_by_gap(torch.tensor([0.9, 0.1, 0.4]), threshold=0.4)
        (tensor([0]), tensor([1, 2]))

    Experimental: the threshold of the paper was not verified, so there is no default.
    """
    if (threshold is None) == (quantile is None):
        got = "both" if quantile is not None else "neither"
        remedy = "A threshold is in units of the reward, a quantile in [0, 1]."
        raise fail("split_by_gap", "threshold, quantile", "exactly one", got, remedy)
    gaps_P = real("split_by_gap", "gaps", gaps, "P")
    if quantile is not None:
        share("split_by_gap", "quantile", quantile)
        threshold = float(gaps_P.nanquantile(quantile)) if gaps_P.numel() else 0.0
    return (gaps_P > threshold).nonzero().squeeze(1), (gaps_P <= threshold).nonzero().squeeze(1)


def replay_sizes(earlier: Sequence[int], share_of_last: float = 0.3) -> list[int]:
    """How many pairs of earlier rounds are used again: DNO's replay (arXiv:2404.03715, section 5).

    At most 30 % of the pairs of the last round, 15 % of the one before, and so on by halves;
    rounded down.

    Args:
        earlier: numbers of pairs of the earlier rounds, the most recent first.
        share_of_last: share of the most recent.

    Returns:
        Numbers of pairs to use again.

    Raises:
        ValueError: the share is not in [0, 1].

    Example:
        >>> replay_sizes([1000, 1000, 400])
        [300, 150, 30]
    """
    share("replay_sizes", "share_of_last", share_of_last)
    # What is a whole number but for rounding counts as one, as 0.29 * 100.
    shares = (share_of_last / 2**age for age in range(len(earlier)))
    return [math.floor(round(n * part, 9)) for n, part in zip(earlier, shares, strict=True)]


def replay_indices(
    earlier: Sequence[int], generator: torch.Generator, share_of_last: float = 0.3
) -> list[Tensor]:
    """Which pairs of earlier rounds are used again, drawn without replacement.

    Args:
        earlier: as in :func:`replay_sizes`.
        generator: source of the draws, on the CPU.
        share_of_last: as in :func:`replay_sizes`.

    Returns:
        For each earlier round int64 indices, rising.

    Raises:
        ValueError: the share is not in [0, 1].

    Example:
        >>> [len(i) for i in replay_indices([10, 10], torch.Generator())]
        [3, 1]
    """
    sizes = replay_sizes(earlier, share_of_last)
    draws = (torch.randperm(n, generator=generator) for n in earlier)
    return [draw[:size].sort().values for draw, size in zip(draws, sizes, strict=True)]
