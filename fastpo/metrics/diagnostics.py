"""Geometry of layers, shortcuts in pairs, utility for users."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpo.metrics._common import fail, prepare


def tail_exponent(singular_values: Tensor, share: float = 0.5) -> Tensor:
    """How fast the tail of a layer's spectrum decays: SPINAL's contraction (arXiv:2601.06238).

    alpha = -d log sigma_k / d log k over the smallest singular values of the layer's hidden states,
    the slope that fits them best in least squares; k counts from 1, the largest. Values k^-a give
    a. The larger, the fewer directions the layer contracts its states into.

    Args:
        singular_values: [..., K] positive, in any order: ``torch.linalg.svdvals(hidden)`` of the
            hidden states [..., tokens, H] that leave the layer.
        share: share of the values taken as the tail, in (0, 1]; at least two of them.

    Returns:
        [...]; NaN where a value of the tail is 0.

    Raises:
        ValueError: there are fewer than two values, or the share is out of range.

    Which values the paper counts as the tail was not readable: ``share`` is our choice.

    Example:
        >>> values = torch.arange(1, 1001, dtype=torch.float64) ** -2
        >>> round(tail_exponent(values).item(), 6)
        2.0
    """
    (values_K,) = prepare("tail_exponent", singular_values=singular_values)
    if values_K.ndim == 0 or values_K.shape[-1] < 2 or not 0 < share <= 1:
        expected, got = (
            "two values or more and a share in (0, 1]",
            f"{list(values_K.shape)}, {share}",
        )
        remedy = "Try torch.linalg.svdvals of the hidden states."
        raise fail("tail_exponent", "singular_values, share", expected, got, remedy)
    count = values_K.shape[-1]
    tail = max(int(share * count), 2)
    logs_K = values_K.sort(-1, descending=True).values[..., -tail:].log()
    ranks_K = torch.arange(count - tail + 1, count + 1, device=logs_K.device).to(logs_K).log()
    logs_K, ranks_K = (x - x.mean(-1, keepdim=True) for x in (logs_K, ranks_K))
    return -(ranks_K * logs_K).sum(-1) / ranks_K.square().sum(-1)


def _angle(distance: Tensor) -> Tensor:
    """2 arccos(1 - x) as 4 arcsin(sqrt(x / 2)), which keeps its digits near 0."""
    return 4 * torch.asin(torch.sqrt((distance / 2).clamp(0, 0.5)))


def bhattacharyya_angle(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Angle 2 arccos sum sqrt(p q) between distributions, the length of the path between them.

    SPINAL (arXiv:2601.06238) takes it of the next-token distributions of adjacent layers.

    Args:
        log_p: [..., V] log-probs, normalised.
        log_q: [..., V] of the other distribution.

    Returns:
        [...] in [0, pi], radians.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
        >>> bhattacharyya_angle(p.log(), q.log())
        tensor(0.4205)
    """
    log_p, log_q = prepare("bhattacharyya_angle", log_p=log_p, log_q=log_q)
    return _angle(((log_p / 2).exp() - (log_q / 2).exp()).square().sum(-1) / 2)


def bhattacharyya_angle_of(divergence: Tensor) -> Tensor:
    """The same angle from an alpha-divergence with alpha = 1/2, which is 4 (1 - sum sqrt(p q)).

    Args:
        divergence: [...] of ``fastpo.linear_divergence(..., kind="alpha", alpha=0.5)``: a logit
            lens needs no distribution over the vocabulary in memory.

    Returns:
        [...] in [0, pi], radians.

    Example:
        >>> bhattacharyya_angle_of(torch.tensor([0.0, 4.0]))
        tensor([0.0000, 3.1416])
    """
    (divergence,) = prepare("bhattacharyya_angle_of", divergence=divergence)
    return _angle(divergence / 4)


def linear_separability(
    chosen: Tensor, rejected: Tensor, folds: int = 5, ridge: float = 1.0
) -> Tensor:
    """Accuracy of a linear probe that tells chosen from rejected responses by hidden states.

    A high value says that the pairs differ in something easy, which training may take as a shortcut
    (arXiv:2504.02193, there for safety pairs whose two responses come from different models). The
    probe is a ridge regression on the label +-1, fitted in closed form on all folds but one and
    tested on that one; both responses of a pair lie in one fold.

    Args:
        chosen: [B, H] hidden states of the chosen responses, pooled over their tokens.
        rejected: [B, H] of the rejected ones.
        folds: how many, from 2 to B.
        ridge: penalty, relative to the mean squared length of a centred vector, > 0.

    Returns:
        0-d in [0, 1]; 0.5 is chance.

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Experimental: of the paper only the abstract was read; the probe is our choice.

    Example:
        >>> shift = torch.tensor([3.0, 0.0, 0.0, 0.0])
        >>> torch.manual_seed(0).initial_seed()
        0
        >>> linear_separability(torch.randn(50, 4) + shift, torch.randn(50, 4) - shift)
        tensor(1.)
    """
    name = "linear_separability"
    chosen_BH, rejected_BH = prepare(name, chosen=chosen, rejected=rejected)
    if chosen_BH.ndim != 2:
        remedy = "Pool the hidden states of a response, for example by their mean."
        raise fail(name, "chosen", "[B, H]", f"{list(chosen_BH.shape)}", remedy)
    pairs = chosen_BH.shape[0]
    if not 2 <= folds <= pairs or not 0 < ridge < math.inf:
        expected, got = f"2 to {pairs} folds and a positive ridge", f"{folds}, {ridge}"
        raise fail(name, "folds, ridge", expected, got, "Give more pairs or fewer folds.")
    correct = chosen_BH.new_zeros(())
    for fold in range(folds):
        others = [other for other in range(folds) if other != fold]
        fitted_NH = torch.cat([x[k::folds] for x in (chosen_BH, rejected_BH) for k in others])
        center_H = fitted_NH.mean(0)
        fitted_NH = fitted_NH - center_H
        labels_N = fitted_NH.new_ones(fitted_NH.shape[0])
        labels_N[fitted_NH.shape[0] // 2 :] = -1
        # Of the two forms of the same regression, the one with the smaller system.
        is_long = fitted_NH.shape[1] > fitted_NH.shape[0]
        gram = fitted_NH @ fitted_NH.T if is_long else fitted_NH.T @ fitted_NH
        penalty = ridge * fitted_NH.square().sum(1).mean() + torch.finfo(gram.dtype).tiny
        system = gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        target = labels_N if is_long else fitted_NH.T @ labels_N
        probe_H = torch.linalg.solve_ex(system, target).result  # solve waits for its error code
        probe_H = fitted_NH.T @ probe_H if is_long else probe_H
        for sign, side_BH in ((1, chosen_BH), (-1, rejected_BH)):
            scores = sign * ((side_BH[fold::folds] - center_H) @ probe_H)
            correct = correct + (scores > 0).sum() + 0.5 * (scores == 0).sum()
    return correct / (2 * pairs)


def rlhs_utility(
    paid: Tensor, cheapest: Tensor, is_bought: Tensor, meets_requirement: Tensor
) -> Tensor:
    """What a user got out of a consultation, in RLHS's simulated shops (arXiv:2501.08617).

    0 without a purchase, -1 if what was bought does not meet the requirement, else the price of the
    cheapest option that does, divided by the price paid.

    Args:
        paid: [B] price of what was bought; unused without a purchase.
        cheapest: [B] price of the cheapest option that meets the requirement.
        is_bought: [B] bool.
        meets_requirement: [B] bool, of what was bought.

    Returns:
        [B] in [-1, 1].

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> yes = torch.tensor([True])
        >>> rlhs_utility(torch.tensor([1000.0]), torch.tensor([800.0]), yes, yes)
        tensor([0.8000])
    """
    names = dict(is_bought=is_bought, meets_requirement=meets_requirement)
    paid_B, cheapest_B, bought_B, meets_B = prepare(
        "rlhs_utility", paid=paid, cheapest=cheapest, **names
    )
    price_share_B = torch.where(meets_B > 0, cheapest_B / paid_B, -1.0)
    return torch.where(bought_B > 0, price_share_B, 0.0)
