"""Self-rewarding rules: the model scores its own responses, now, before and later."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.data._checks import fail, first_max, first_min, scores_of
from fastpo.data.pairs import Pairs, best_worst, pairs_where
from fastpo.data.scores import mean_judgements


def self_rewarding_pairs(judgements: Tensor) -> Pairs:
    """Self-Rewarding (arXiv:2401.10020): best against worst by the mean of several judgements.

    Args:
        judgements: [B, K, J] scores the model gave its own responses, 4 with 3 judgements each in
            the paper; NaN for one that could not be read.

    Returns:
        Pairs, at most one per prompt; none where all means are equal. Of equally good or bad
        responses the first, a choice of this library.

    Raises:
        ValueError: the shape does not fit.

    Example:
        >>> self_rewarding_pairs(torch.tensor([[[4, 5, 4], [3, 3, 3], [5, 5, 4], [3, 2, 4]]]))[:3]
        (tensor([0]), tensor([2]), tensor([1]))
    """
    return best_worst(mean_judgements(judgements))


def _candidates(function: str, **scores: Tensor | None) -> list[Tensor | None]:
    """Checked scores of each source, for the same prompts."""
    found = [None if s is None else scores_of(function, s, name) for name, s in scores.items()]
    prompts = {len(scores_BK) for scores_BK in found if scores_BK is not None}
    if len(prompts) > 1:
        remedy = "Give a row of NaN to a prompt without scores."
        names = ", ".join(scores)
        raise fail(function, names, "as many prompts in each", f"{sorted(prompts)}", remedy)
    return found


def _one_of_all(scores_BK: Tensor, chosen_B: Tensor, rejected_B: Tensor) -> Pairs:
    """The pairs whose chosen score is larger; False for a NaN."""
    top_B, bottom_B = (scores_BK.gather(1, c[:, None]).squeeze(1) for c in (chosen_B, rejected_B))
    return pairs_where(top_B > bottom_B, chosen_B, rejected_B)


def _decoupled(current_BK: Tensor, initial_BK: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of all candidates so far, the best of now and the worst of now or the beginning."""
    chosen_B, rejected_B = first_max(current_BK), first_min(current_BK)
    if initial_BK is None:
        return current_BK, chosen_B, rejected_B
    past_B = first_min(initial_BK)
    lowest_B = current_BK.gather(1, rejected_B[:, None]).squeeze(1)
    is_lower_B = initial_BK.gather(1, past_B[:, None]).squeeze(1) < lowest_B
    rejected_B = torch.where(is_lower_B, current_BK.shape[1] + past_B, rejected_B)
    return torch.cat([current_BK, initial_BK], 1), chosen_B, rejected_B


def temporal_first_pairs(current: Tensor, initial: Tensor | None = None) -> Pairs:
    """Temporal Self-Rewarding (arXiv:2508.06026), phase 1: the worst may come from the past.

    Chosen is the best response of the current model; rejected is the worst of the initial model
    where that is worse than the worst of the current one, which is taken otherwise.

    Args:
        current: [B, K] scores of the current model's responses, given by the current model.
        initial: [B, K0] scores of the initial model's responses, by the same judge. Without them
            the rule is that of Self-Rewarding.

    Returns:
        Pairs with a larger chosen score, columns of ``torch.cat([current, initial], 1)``.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> temporal_first_pairs(torch.tensor([[3, 5, 4]]), torch.tensor([[2, 4, 1]]))[:3]
        (tensor([0]), tensor([1]), tensor([5]))
    """
    found = _candidates("temporal_first_pairs", current=current, initial=initial)
    return _one_of_all(*_decoupled(*found))


def temporal_second_pairs(current: Tensor, future: Tensor, initial: Tensor | None = None) -> Pairs:
    """Temporal Self-Rewarding (arXiv:2508.06026), phase 2: the best may come from the future.

    Chosen is the best response of the model trained on the pairs of phase 1, where it is better
    than the best of the current model, which is taken otherwise. Rejected is that of phase 1, also
    for a prompt that gave no pair there.

    Args:
        current: [B, K] as in :func:`temporal_first_pairs`.
        future: [B, K2] scores of the responses of the model of phase 1, given by the current model.
        initial: [B, K0] as in :func:`temporal_first_pairs`.

    Returns:
        Pairs with a larger chosen score, columns of ``torch.cat([current, initial, future], 1)``.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> scores = torch.tensor([[3, 5, 4]]), torch.tensor([[6, 5, 2]]), torch.tensor([[2, 4, 1]])
        >>> temporal_second_pairs(*scores)[:3]
        (tensor([0]), tensor([6]), tensor([5]))
    """
    function = "temporal_second_pairs"
    current_BK, initial_BK, future_BK = _candidates(
        function, current=current, initial=initial, future=future
    )
    past_BK, chosen_B, rejected_B = _decoupled(current_BK, initial_BK)
    best_B = first_max(future_BK)
    highest_B = past_BK.gather(1, chosen_B[:, None]).squeeze(1)
    is_higher_B = future_BK.gather(1, best_B[:, None]).squeeze(1) > highest_B
    chosen_B = torch.where(is_higher_B, past_BK.shape[1] + best_B, chosen_B)
    return _one_of_all(torch.cat([past_BK, future_BK], 1), chosen_B, rejected_B)
