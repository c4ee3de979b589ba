"""Scores of the responses of a prompt to pairs of a chosen and a rejected response.

Scores are [B, K]: B prompts, K responses each, larger is better, NaN for a response that was not
scored (or is not there): it is never part of a pair. Where scores are equal the smaller column
comes first. The number of pairs depends on the scores, so on a GPU every rule waits for the device.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastpo.data._checks import (
    at_least,
    choice,
    fail,
    first_max,
    first_min,
    ranking,
    real,
    scores_of,
    square,
)
from fastpo.data.win_rates import win_rates

Pairing = Literal["adjacent", "all", "best_vs_rest"]
PAIRINGS = ("adjacent", "all", "best_vs_rest")


class Pairs(NamedTuple):
    """P pairs, as places in the [B, K] responses they come from.

    ``len()`` is that of a tuple; the number of pairs is ``num_pairs``.

    Attributes:
        prompt: [P] int64, row of the prompt.
        chosen: [P] int64, column of the chosen response.
        rejected: [P] int64, column of the rejected response.
        label: [P] probability that chosen beats rejected, or None for certain pairs.
    """

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor
    label: Tensor | None = None

    @property
    def num_pairs(self) -> int:
        """P."""
        return self.prompt.shape[0]

    def select(self, keep: Tensor) -> Pairs:
        """The pairs of a bool mask [P], or those at some indices in their order."""
        label = None if self.label is None else self.label[keep]
        return Pairs(self.prompt[keep], self.chosen[keep], self.rejected[keep], label)

    def gather(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values [B, K, ...] of the chosen and of the rejected responses, both [P, ...]."""
        return values[self.prompt, self.chosen], values[self.prompt, self.rejected]

    def gaps(self, scores: Tensor) -> Tensor:
        """[P] score of chosen minus that of rejected, from scores [B, K]."""
        chosen_P, rejected_P = self.gather(real("Pairs.gaps", "scores", scores, "B K"))
        return chosen_P - rejected_P


def pairs_where(keep: Tensor, chosen: Tensor, rejected: Tensor) -> Pairs:
    """One pair for each prompt with ``keep``; all arguments are [B]."""
    prompt = keep.nonzero().squeeze(1)
    return Pairs(prompt, chosen[prompt], rejected[prompt])


def all_pairs_where(keep: Tensor, label: Tensor | None = None) -> Pairs:
    """A pair for each True of ``keep`` [B, K, K], in the order of prompt, chosen, rejected."""
    prompt, chosen, rejected = keep.nonzero().unbind(1)
    label = None if label is None else label[prompt, chosen, rejected]
    return Pairs(prompt, chosen, rejected, label)


def best_worst(
    scores: Tensor, min_gap: float = 0.0, equal: Literal["drop", "first_two"] = "drop"
) -> Pairs:
    """The best response of each prompt against its worst, at most one pair per prompt.

    The rule of Self-Rewarding (arXiv:2401.10020, equal scores dropped), SPPO (arXiv:2405.00675),
    INPO with a reward model (arXiv:2407.00617), REBEL with more than two samples (arXiv:2404.16767,
    identical responses dropped: :func:`fastpo.data.ids.drop_identical`), UltraGen
    (arXiv:2502.12375), and SELM (arXiv:2405.19332), whose columns are the policy's own greedy
    response, the chosen and the rejected one of the data set. MNPO (arXiv:2509.23102) drops prompts
    whose responses are all identical (:func:`fastpo.data.ids.has_variety`) and has
    ``equal="first_two"``.

    Args:
        scores: [B, K].
        min_gap: pairs below this difference of scores are dropped, for the best and worst of
            EVOLVE (arXiv:2502.05605); the default drops equal scores only. The filter was not read
            in that paper (experimental).
        equal: prompts whose scores are all equal: ``drop`` them, or take the ``first_two`` scored
            responses, whatever ``min_gap`` says.

    Returns:
        Pairs, in the order of prompts; the first of equally good and of equally bad responses.

    Raises:
        ValueError: the shape does not fit, or an option is out of range.

    Example:
        >>> best_worst(torch.tensor([[13.0, 9, 14, 9], [5, 5, 5, 5]]))[:3]
        (tensor([0]), tensor([2]), tensor([1]))
        >>> best_worst(torch.tensor([[5.0, 5, 5, 5]]), equal="first_two")[:3]
        (tensor([0]), tensor([0]), tensor([1]))
    """
    choice("best_worst", "equal", equal, ("drop", "first_two"))
    at_least("best_worst", "min_gap", min_gap, 0)
    scores_BK = scores_of("best_worst", scores)
    best_B, worst_B = first_max(scores_BK), first_min(scores_BK)
    top_B, bottom_B = (scores_BK.gather(1, c[:, None]).squeeze(1) for c in (best_B, worst_B))
    # With all of one score, infinite perhaps, best and worst are the same column.
    keep_B = (top_B > bottom_B) & (top_B - bottom_B >= min_gap)
    if equal == "first_two":
        known_BK = ~scores_BK.isnan()
        is_level_B = (top_B == bottom_B) & (known_BK.sum(1) >= 2)
        second_B = (known_BK.cumsum(1) == 2).byte().argmax(1)
        worst_B = torch.where(is_level_B, second_B, worst_B)
        keep_B = keep_B | is_level_B
    return pairs_where(keep_B, best_B, worst_B)


def first_unless_worse(scores: Tensor) -> Pairs:
    """Of two responses the first is chosen unless its score is smaller; equal scores are kept.

    The rule of Online DPO (arXiv:2402.04792) as in TRL, with two samples of the policy and scores
    by :func:`~fastpo.data.scores.weighted_rewards` and
    :func:`~fastpo.data.scores.penalize_missing_eos`; and of XPO (arXiv:2405.21046), with a sample
    of the policy in column 0 and one of the reference model in column 1.

    Args:
        scores: [B, 2].

    Returns:
        Pairs, one for each prompt with two scores.

    Raises:
        ValueError: there are not two responses per prompt.

    Example:
        >>> first_unless_worse(torch.tensor([[0.3, 0.3], [0.1, 0.2]]))[:3]
        (tensor([0, 1]), tensor([0, 1]), tensor([1, 0]))
    """
    scores_BK = scores_of("first_unless_worse", scores)
    if scores_BK.shape[1] != 2:
        remedy = "Take best_worst for more responses."
        raise fail("first_unless_worse", "scores", "[B, 2]", f"{list(scores.shape)}", remedy)
    first_B, second_B = scores_BK.unbind(1)
    rejected_B = (first_B >= second_B).long()
    return pairs_where(~scores_BK.isnan().any(1), 1 - rejected_B, rejected_B)


def above_gap(scores: Tensor, threshold: float = 0.0) -> Pairs:
    """All pairs whose scores differ by more than ``threshold``, the larger one chosen.

    Agent Q (arXiv:2408.07199) keeps siblings of a search tree so, by mixed Q values
    (:func:`fastpo.data.trees.mixed_q_values`); its threshold could not be verified. With verdicts 0
    and 1 as scores: every accepted response against every refused one.

    Args:
        scores: [B, K].
        threshold: strict lower bound of the difference; 0 keeps all pairs of different scores.

    Returns:
        Pairs, in the order of prompt, chosen and rejected.

    Raises:
        ValueError: the shape does not fit, or the threshold is negative.

    Example:
        >>> above_gap(torch.tensor([[0.4, 0.6, 0.5]]), threshold=0.05)[1:3]
        (tensor([1, 1, 2]), tensor([0, 2, 0]))
    """
    at_least("above_gap", "threshold", threshold, 0)
    scores_BK = scores_of("above_gap", scores)
    return all_pairs_where(scores_BK[:, :, None] - scores_BK[:, None, :] > threshold)


def rank_pairs(scores_BK: Tensor, keep_BKK: Tensor, keep_equal: bool = False) -> Pairs:
    """Pairs of ranks (0 best) in ``keep``, of scored responses, as pairs of columns."""
    order_BK = ranking(scores_BK)
    ranked_BK = scores_BK.gather(1, order_BK)
    better_BK1, worse_B1K = ranked_BK[:, :, None], ranked_BK[:, None, :]
    # Both comparisons are False for NaN.
    differs_BKK = better_BK1 >= worse_B1K if keep_equal else better_BK1 > worse_B1K
    ranks = all_pairs_where(keep_BKK.triu(1) & differs_BKK)
    columns = (order_BK[ranks.prompt, rank] for rank in (ranks.chosen, ranks.rejected))
    return Pairs(ranks.prompt, *columns)


def _pairing_mask(scores_BK: Tensor, which: Pairing) -> Tensor:
    size = scores_BK.shape[1]
    ones_KK = torch.ones(size, size, dtype=torch.bool, device=scores_BK.device).triu(1)
    if which == "adjacent":
        ones_KK = ones_KK & ~ones_KK.triu(2)
    elif which == "best_vs_rest":
        ones_KK[1:] = False
    return ones_KK.expand(scores_BK.shape[0], size, size)


def ranked_pairs(scores: Tensor, which: Pairing = "all") -> Pairs:
    """Pairs of a ranking by score: neighbours, all, or the best against each other one.

    Args:
        scores: [B, K].
        which: ``adjacent`` ranks, ``all`` pairs, or ``best_vs_rest``.

    Returns:
        Pairs, in the order of prompt, rank of chosen and rank of rejected. Pairs of equal scores
        are dropped.

    Raises:
        ValueError: the shape does not fit, or ``which`` is unknown.

    Example:
        >>> ranked_pairs(torch.tensor([[0.1, 0.9, 0.5]]), "adjacent")[1:3]
        (tensor([1, 2]), tensor([2, 0]))
        >>> ranked_pairs(torch.tensor([[0.1, 0.9, 0.5]]), "best_vs_rest")[1:3]
        (tensor([1, 1]), tensor([2, 0]))
    """
    choice("ranked_pairs", "which", which, PAIRINGS)
    scores_BK = scores_of("ranked_pairs", scores)
    return rank_pairs(scores_BK, _pairing_mask(scores_BK, which))


def self_preference_pairs(strengths: Tensor, which: Pairing = "all") -> Pairs:
    """Pairs of a ranking by mean strength, each with its strength as soft label.

    Args:
        strengths: [B, K, K], entry [i, j] the probability that i beats j, for example of
            :func:`~fastpo.data.win_rates.judge_strengths`; NaN where unknown.
        which: as in :func:`ranked_pairs`.

    Returns:
        Pairs with ``label``, in the order of prompt, rank of chosen and rank of rejected. Equal
        mean strengths are kept, as in a cycle, where the label still tells; a label can be below
        1/2, and a pair without one is dropped.

    Raises:
        ValueError: the shape does not fit, or ``which`` is unknown.

    Example:
        >>> strengths = torch.tensor([[[0.5, 0.8, 0.3], [0.2, 0.5, 0.9], [0.7, 0.1, 0.5]]])
        >>> self_preference_pairs(strengths, "best_vs_rest")[1:]
        (tensor([0, 0]), tensor([1, 2]), tensor([0.8000, 0.3000]))

    Experimental: Online Self-Preferring (arXiv:2405.14103) forms pairs from a ranking with
    strengths; which ones was not read in the paper.
    """
    choice("self_preference_pairs", "which", which, PAIRINGS)
    strengths_BKK = real("self_preference_pairs", "strengths", strengths, "B K K")
    square("self_preference_pairs", "strengths", strengths_BKK)
    scores_BK = scores_of("self_preference_pairs", win_rates(strengths_BKK), "strengths")
    pairs = rank_pairs(scores_BK, _pairing_mask(scores_BK, which), keep_equal=True)
    label_P = strengths_BKK[pairs.prompt, pairs.chosen, pairs.rejected]
    return pairs._replace(label=label_P).select(~label_P.isnan())


def both_orders(pairs: Pairs) -> Pairs:
    """All pairs, then all of them with chosen and rejected exchanged and the label turned round.

    SRPO's improver (arXiv:2406.01660) learns from both orders: 1 for the pair, 0 for its reverse.

    Args:
        pairs: of any rule; a pair without a label counts as labelled 1.

    Returns:
        Pairs, twice as many.

    Example:
        >>> one = Pairs(torch.tensor([0]), torch.tensor([2]), torch.tensor([1]))
        >>> both_orders(one)[1:]
        (tensor([2, 1]), tensor([1, 2]), tensor([1., 0.]))
    """
    prompt, chosen, rejected, label = pairs
    if label is None:
        label = torch.ones(prompt.shape, device=prompt.device)
    return Pairs(
        torch.cat([prompt, prompt]),
        torch.cat([chosen, rejected]),
        torch.cat([rejected, chosen]),
        torch.cat([label, 1 - label]),
    )
