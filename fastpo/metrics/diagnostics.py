"""Geometry of layers, shortcuts in pairs, utility for users."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpo.metrics._common import fail, prepare


def tail_exponent(singular_values: Tensor, share: float = 0.1) -> Tensor:
    """Exponent of the power-law tail of singular values, by the Hill estimator.

    a = k / sum_{i <= k} log(x_i / x_{k+1}) over the k largest values: the share of values beyond x
    falls like x^-a, their density like x^-(a + 1). SPINAL (arXiv:2601.06238) follows it over the
    layers of a model.

    Args:
        singular_values: [..., K] positive, in any order, of a layer's matrix.
        share: share of the values taken as the tail, in (0, 1); at least one and at most K - 1.

    Returns:
        [...]; infinite if the tail's values are all alike.

    Raises:
        ValueError: there are fewer than two values, or the share is out of range.

    Experimental: of the paper only the abstract was read; the estimator is our choice.

    Example:
        >>> values = torch.arange(1, 1001, dtype=torch.float64) ** -0.5  # tail exponent 2
        >>> round(tail_exponent(values, 0.5).item(), 1)
        2.0
    """
    (values_K,) = prepare("tail_exponent", singular_values=singular_values)
    if values_K.ndim == 0 or values_K.shape[-1] < 2 or not 0 < share < 1:
        expected, got = (
            "two values or more and a share in (0, 1)",
            f"{list(values_K.shape)}, {share}",
        )
        raise fail(
            "tail_exponent", "singular_values, share", expected, got, "Try torch.linalg.svdvals."
        )
    k = min(max(int(share * values_K.shape[-1]), 1), values_K.shape[-1] - 1)
    logs_K = values_K.topk(k + 1, -1).values.log()
    return k / (logs_K[..., :-1] - logs_K[..., -1:]).sum(-1)


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

    Experimental: of the paper only the abstract was read; the form is from memory.

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
