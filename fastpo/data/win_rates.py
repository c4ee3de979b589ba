"""Preference matrices and win rates: how often a response beats the others of its prompt.

A preference matrix P [..., K, K] holds P[i, j], the probability that response i beats response j;
NaN where the two were not compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.data._checks import fail, floats, same_shape, square


def bradley_terry_matrix(scores: Tensor) -> Tensor:
    """P[i, j] = sigmoid(s_i - s_j): the preferences that scores of a reward model stand for.

    SPPO (arXiv:2405.00675) takes them from the scores of a pairwise ranker.

    Args:
        scores: [..., K] rewards, natural-log odds; NaN for a response without one.

    Returns:
        [..., K, K] probabilities, 1/2 on the diagonal; NaN in the row and column of a NaN.

    Raises:
        ValueError: ``scores`` has no dimension.

    Example:
        >>> bradley_terry_matrix(torch.tensor([0.0, 0.0]))
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """
    if scores.ndim == 0:
        remedy = "Give the scores of all responses of a prompt."
        raise fail("bradley_terry_matrix", "scores", "[..., K]", "a single number", remedy)
    scores = floats(scores)
    return torch.sigmoid(scores.unsqueeze(-1) - scores.unsqueeze(-2))


def win_rates(preferences: Tensor, include_self: bool = False) -> Tensor:
    """Mean probability of each response to beat the others of its prompt.

    Without the diagonal: the reward of SPO (arXiv:2401.04056), the share of its comparisons that a
    response wins. With it: SPPO's p_i = (1/K) sum_j P_ij (arXiv:2405.00675), in which a response
    also meets itself, P_ii = 1/2; the same mean over scores s(y_i > y_j) with s_ii = 0 is the
    score of GPO (arXiv:2410.02197).

    Args:
        preferences: [..., K, K]; NaN for a comparison that was not made, which does not count.
        include_self: whether the diagonal counts, with the value that stands there.

    Returns:
        [..., K]; NaN for a response without any comparison.

    Raises:
        ValueError: the matrices are not square.

    Example:
        >>> win_rates(torch.tensor([[0.5, 0.8, 0.3], [0.2, 0.5, 0.9], [0.7, 0.1, 0.5]]))
        tensor([0.5500, 0.5500, 0.4000])
    """
    square("win_rates", "preferences", preferences)
    values = floats(preferences)
    counted = ~values.isnan()
    if not include_self:
        counted &= ~torch.eye(values.shape[-1], dtype=torch.bool, device=values.device)
    return torch.where(counted, values, 0).sum(-1) / counted.sum(-1)


def sampled_win_rates(preferences: Tensor, generator: torch.Generator) -> Tensor:
    """Win rates from one drawn comparison per pair, as DNO estimates its r_t.

    r(y) = (1/K) sum over the K other responses of one Bernoulli draw of "y beats y'"
    (arXiv:2404.03715; K samples of the policy and one of a teacher make K + 1 responses). A pair
    is drawn once and read from both sides, so that the mean rate of a prompt is 1/2 exactly; this
    and taking P above the diagonal for it are choices of this library.

    Args:
        preferences: [..., K, K], on the device of the generator; NaN as in :func:`win_rates`.
        generator: source of the draws.

    Returns:
        [..., K]; NaN for a response without any comparison.

    Raises:
        ValueError: the matrices are not square.

    Example:
        >>> sampled_win_rates(torch.tensor([[0.5, 1.0], [0.0, 0.5]]), torch.Generator())
        tensor([1., 0.])
    """
    square("sampled_win_rates", "preferences", preferences)
    values = floats(preferences)
    # Drawn for every entry, known or not: a NaN elsewhere must not change the other draws.
    uniform = torch.rand(
        values.shape, generator=generator, dtype=values.dtype, device=values.device
    )
    drawn = torch.where(values.isnan(), values, (uniform < values).to(values.dtype)).triu(1)
    return win_rates(drawn + (1 - drawn).triu(1).mT)


def judge_strengths(first_logprobs: Tensor, second_logprobs: Tensor) -> Tensor:
    """Preference matrix of a model that judges two responses, asked in both orders.

    q_ij = ([first | i, j] + [second | j, i]) / 2, where [first | i, j] is the probability of the
    option "the first one is better" with i shown first, renormalised over the two option tokens.

    Args:
        first_logprobs: [..., K, K] log-probs (nats) of the token of the first option; entry [i, j]
            with i shown first. NaN where it was not asked.
        second_logprobs: [..., K, K] the same of the second option.

    Returns:
        [..., K, K] with q_ij + q_ji = 1 and 1/2 on the diagonal; NaN unless both orders are known.

    Raises:
        ValueError: shapes differ, or the matrices are not square.

    Example:
        >>> yes = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
        >>> judge_strengths(yes, yes - torch.tensor([[0.0, 2.0], [-2.0, 0.0]]))
        tensor([[0.5000, 0.8808],
                [0.1192, 0.5000]])

    Experimental: Online Self-Preferring (arXiv:2405.14103) judges its own samples; this form of
    its strength was not read in the paper.
    """
    square("judge_strengths", "first_logprobs", first_logprobs)
    same_shape("judge_strengths", first_logprobs=first_logprobs, second_logprobs=second_logprobs)
    first = torch.sigmoid(floats(first_logprobs) - floats(second_logprobs))
    strengths = (first + 1 - first.mT) / 2
    return torch.where(torch.eye(first.shape[-1], device=first.device) == 1, 0.5, strengths)
