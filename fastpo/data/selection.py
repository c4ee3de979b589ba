"""Which responses, turns or attributes to keep, and in which order."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastpo.data._checks import at_least, bools, fail, first_max, ranking, real, scores_of, share


class Selection(NamedTuple):
    """S responses, as places in the [B, K] responses they come from.

    Attributes:
        prompt: [S] int64, row of the prompt.
        response: [S] int64, column of the response.
    """

    prompt: Tensor
    response: Tensor

    def gather(self, values: Tensor) -> Tensor:
        """Values [B, K, ...] of the selected responses, [S, ...]."""
        return values[self.prompt, self.response]


def top_fraction(scores: Tensor, fraction: float = 0.2) -> Selection:
    """The best responses of all prompts together, for fine-tuning: RAFT (arXiv:2304.06767).

    As in the authors' code, with one response per prompt there: prompts compete with each other,
    and the number kept is rounded down.

    Args:
        scores: [B, K].
        fraction: of the scored responses, in [0, 1].

    Returns:
        Selection, best first; the first row, then column, of equal scores.

    Raises:
        ValueError: the shape does not fit, or the fraction is out of range.

    Example:
        >>> top_fraction(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), fraction=0.5)
        Selection(prompt=tensor([0, 1]), response=tensor([1, 0]))
    """
    share("top_fraction", "fraction", fraction)
    scores_BK = scores_of("top_fraction", scores)
    known = int((~scores_BK.isnan()).sum())
    # 0.29 * 100 is 28.999999999999996: what is a whole number but for rounding counts as one.
    count = math.floor(round(known * fraction, 9))
    best = ranking(scores_BK.reshape(1, -1)).squeeze(0)[:count]
    return Selection(best // scores_BK.shape[1], best % scores_BK.shape[1])


def best_of_n(scores: Tensor) -> Selection:
    """The best response of each prompt: best-of-n, and the classic form of RAFT (arXiv:2304.06767).

    Args:
        scores: [B, K].

    Returns:
        Selection, one for each prompt with a score, in the order of prompts; the first of equals.

    Raises:
        ValueError: the shape does not fit.

    Example:
        >>> best_of_n(torch.tensor([[0.1, 0.9], [0.8, 0.8]]))
        Selection(prompt=tensor([0, 1]), response=tensor([1, 0]))
    """
    scores_BK = scores_of("best_of_n", scores)
    prompt = (~scores_BK.isnan()).any(1).nonzero().squeeze(1)
    return Selection(prompt, first_max(scores_BK)[prompt])


class RankedLists(NamedTuple):
    """The responses of each prompt from best to worst, as the listwise losses take them.

    Attributes:
        order: [B, K] int64 columns; those without a score stand at the end.
        counts: [B] int64, scored responses: the length of the list.
    """

    order: Tensor
    counts: Tensor


def ranked_lists(scores: Tensor) -> RankedLists:
    """Rank the responses of each prompt: for PRO (arXiv:2306.17492) and Plackett-Luce losses.

    Args:
        scores: [B, K].

    Returns:
        RankedLists; equal scores in the order of columns.

    Raises:
        ValueError: the shape does not fit.

    Example:
        >>> ranked_lists(torch.tensor([[0.3, float("nan"), 2.0, 1.2]]))
        RankedLists(order=tensor([[2, 3, 0, 1]]), counts=tensor([3]))
    """
    scores_BK = scores_of("ranked_lists", scores)
    return RankedLists(ranking(scores_BK), (~scores_BK.isnan()).sum(1))


def pairs_from_rewrites(scores: Tensor, threshold: float = 4) -> Selection:
    """Turns of dialogues to be rewritten: ECPO (arXiv:2506.14302).

    A simulated user grades every turn (0 to 5); turns of at most ``threshold`` are rewritten, in
    the authors' code all that are graded below 5, and (rewritten chosen, original rejected) on the
    same history is a pair.

    Args:
        scores: [B, T] grades of the turns, NaN where a dialogue has none.
        threshold: the paper's lambda, which tries 1 to 4.

    Returns:
        Selection: ``prompt`` is the dialogue, ``response`` the turn.

    Raises:
        ValueError: the shape does not fit.

    Example:
        >>> pairs_from_rewrites(torch.tensor([[5, 2, 3, 1]]), threshold=2).response
        tensor([1, 3])
    """
    scores_BT = real("pairs_from_rewrites", "scores", scores, "B T")
    return Selection(*(scores_BT <= threshold).nonzero().unbind(1))


def draw_attribute_counts(
    generator: torch.Generator, min_size: int = 10, max_size: int = 50
) -> tuple[int, int]:
    """How many soft and hard attributes UltraGen (arXiv:2502.12375) puts into one set.

    The size is uniform in [min_size, max_size]; of these, soft ones uniform in [1, min(size, 10)).

    Returns:
        Number of soft attributes, the seed included, and of hard ones.

    Raises:
        ValueError: ``min_size`` is below 2 or above ``max_size``.

    Example:
        >>> soft, hard = draw_attribute_counts(torch.Generator())
        >>> 1 <= soft <= 9 and 10 <= soft + hard <= 50
        True
    """
    at_least("draw_attribute_counts", "min_size", min_size, 2)
    at_least("draw_attribute_counts", "max_size", max_size, min_size)
    size = int(torch.randint(min_size, max_size + 1, (), generator=generator))
    soft = int(torch.randint(1, min(size, 10), (), generator=generator))
    return soft, size - soft


def greedy_attributes(
    embeddings: Tensor, is_soft: Tensor, seed: int, soft: int, hard: int
) -> Tensor:
    """A set of dissimilar attributes around a seed, as UltraGen's code picks them.

    From the seed on, the attribute of the smallest score is taken next, score_j = min over the
    chosen ones of cosine(j, chosen): low similarity to any single one of them is enough. An
    attribute whose kind is complete is passed over for good. The paper is arXiv:2502.12375.

    Args:
        embeddings: [N, D] of the candidates, in the released code the 1024 nearest of the seed in
            another, correlation-trained embedding.
        is_soft: bool [N], soft attributes; the others are hard.
        seed: index of the first attribute, a soft one.
        soft: number of soft attributes wanted, the seed included, at least 1.
        hard: number of hard attributes wanted.

    Returns:
        [S] int64 indices in the order of choice, the seed first; fewer than ``soft + hard`` if the
        candidates run out (the released code fails there). The first of equal scores.

    Raises:
        ValueError: shapes do not fit, the seed is not a soft attribute, or a count is too small.

    Example:
        >>> points = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.1]])
        >>> greedy_attributes(points, torch.tensor([True, True, False, True]), 0, soft=2, hard=1)
        tensor([0, 3, 2])
    """
    function = "greedy_attributes"
    vectors_ND = normalize(real(function, "embeddings", embeddings, "N D"), dim=1)
    count = vectors_ND.shape[0]
    soft_kinds = bools(function, "is_soft", is_soft, torch.Size([count])).tolist()
    at_least(function, "soft", soft, 1)
    at_least(function, "hard", hard, 0)
    if not 0 <= seed < count or not soft_kinds[seed]:
        remedy = "Start from a soft attribute."
        raise fail(function, "seed", f"a soft attribute in [0, {count})", f"{seed}", remedy)
    chosen, missing = [seed], {True: soft - 1, False: hard}
    score_N = vectors_ND @ vectors_ND[seed]
    score_N[seed] = torch.inf
    for _ in range(count - 1):
        if not any(missing.values()):
            break
        best = int(score_N.argmin())
        if missing[soft_kinds[best]]:
            missing[soft_kinds[best]] -= 1
            chosen.append(best)
            # An infinite score stays: what has been seen does not come back.
            closer_N = torch.minimum(score_N, vectors_ND @ vectors_ND[best])
            score_N = torch.where(score_N.isinf(), score_N, closer_N)
        score_N[best] = torch.inf
    return torch.tensor(chosen, device=embeddings.device)
