"""Advantages for pass@k: that at least one of k responses is right."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.advantages import _groups as shared
from fastpo.groups import Groups
from fastpo.operands import replaced


def _of_pairs(lead_G: Tensor, groups: Groups) -> Tensor:
    """As given, and NaN for groups of one row, which are an error where looking is free."""
    offsets, _, size, _ = groups.layout
    if offsets is None:
        has_lone = size == 1 and groups.rows > 0
    else:
        lone_G = offsets.diff() == 1
        if not shared.is_checkable(offsets):
            return torch.where(lone_G, torch.nan, lead_G)
        has_lone = bool(lone_G.any())
    if has_lone:
        remedy = "Drop prompts with one response."
        raise shared.fail("passk_max", "groups", "at least two rows in each", "one", remedy)
    return lead_G


def passk_max(
    rewards: Tensor, groups: Groups | Tensor | int | None = None, *, eps: float = 1e-6
) -> Tensor:
    """Pass@k as a maximum: only the best response has an advantage, its lead over the next.

    A = (r_max - r_second) / (std_g + eps) at the first largest reward, 0 elsewhere
    (arXiv:2503.19595, as verl computes it). On ties for the largest all are 0.

    Args:
        rewards: [N] with ``groups``, or [P, G] without; NaN where there is none.
        groups: the size of every group, at least 2, int ids [N], or :class:`fastpo.Groups`.
        eps: >= 0.

    Returns:
        Float32, or float64 for float64 rewards, in the shape of ``rewards``. No gradient. On a GPU
        the row of a ragged group of one is NaN; on the CPU it is an error.

    Raises:
        ValueError: shapes do not fit, a group has one row, or eps is out of range.

    Example:
        >>> passk_max(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]]))
        tensor([[2.0000, 0.0000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.0000, 0.0000]])
    """
    shared.check_range("passk_max", "eps", eps, 0, "1e-6 is verl's.")
    rows = shared.rows_of("passk_max", rewards, groups)
    stats = rows.stats()
    lead_G = torch.where(stats.count > 1, stats.max - stats.second_max, 0.0)
    lead_G = lead_G * shared.reciprocal(shared.group_std(stats, "zero", 1), eps)
    lead_G = _of_pairs(lead_G, rows.groups)
    best_N = shared.marked_rows(stats.arg_max, rows.groups.rows)
    zero_G = torch.zeros_like(lead_G)
    ones_N = torch.where(best_N, 1.0, torch.nan).to(rows.dtype)  # NaN becomes 0
    return replaced(rows, rewards=ones_N).affine(zero_G, lead_G)


def passk_analytic(
    rewards: Tensor, groups: Groups | Tensor | int | None = None, *, k: int, eps: float = 1e-6
) -> Tensor:
    """Pass@k in closed form: the mean advantage of a response over all subsets of k.

    With n responses, w of them wrong, P = 1 - C(w, k) / C(n, k) and s = sqrt(P (1 - P)):
    A = (1 - P) / (s + eps) for right and (1 - P - C(w - 1, k - 1) / C(n - 1, k - 1)) / (s + eps)
    for wrong responses  (arXiv:2508.10751, with the eps of the authors' code). Equals
    (r - mean_g) q / (s + eps), q = C(w - 1, k - 1) / C(n - 1, k - 1), as it is computed here; k = 1
    is GRPO with ddof 0.

    Args:
        rewards: 0 or 1: [N] with ``groups``, or [P, G] without; NaN where there is none.
        groups: the size of every group, int ids [N], or :class:`fastpo.Groups`.
        k: size of the subsets, from 1 to the rewards in a group.
        eps: >= 0; the paper's formula has none.

    Returns:
        Float32, or float64 for float64 rewards, in the shape of ``rewards``. No gradient. On a GPU
        groups of fewer than k rewards or with other rewards are NaN; on the CPU they are an error.

    Raises:
        ValueError: shapes do not fit, k or eps is out of range, or rewards are not 0 or 1.

    Example:
        >>> passk_analytic(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), k=2)
        tensor([[ 1.0000, -0.3333, -0.3333, -0.3333]])
    """
    shared.check_range("passk_analytic", "k", k, 1, "Pass the k of pass@k.")
    shared.check_range("passk_analytic", "eps", eps, 0, "1e-6 is the authors'.")
    rows = shared.rows_of("passk_analytic", rewards, groups)
    is_other_N = (rows.rewards != 0) & (rows.rewards != 1) & ~rows.rewards.isnan()
    # An infinite reward marks the group it spoils.
    stats = replaced(rows, rewards=rows.rewards.masked_fill(is_other_N, torch.inf)).stats()
    too_few_G = (stats.count > 0) & (stats.count < k)
    if shared.is_checkable(is_other_N):
        if is_other_N.any():
            remedy = "Round or threshold them."
            raise shared.fail("passk_analytic", "rewards", "0 or 1", "others", remedy)
        if too_few_G.any():
            expected = f"at least k = {k} rewards in each"
            raise shared.fail("passk_analytic", "groups", expected, "fewer", "Lower k.")
    # In float64: differences of lgamma of large counts keep few digits.
    count_G, mean_G = stats.count.double(), stats.mean.double()
    wrong_G = count_G - (count_G * mean_G).round()
    log_q_G = wrong_G.lgamma() - (wrong_G - k + 1).lgamma()
    log_q_G = log_q_G - count_G.lgamma() + (count_G - k + 1).lgamma()
    q_G = torch.where((wrong_G >= k) & (count_G >= k), log_q_G.exp(), 0.0)
    failed_G = q_G * wrong_G / count_G.clamp(min=1)  # C(w, k) / C(n, k)
    scale_G = q_G * shared.reciprocal((failed_G * (1 - failed_G)).clamp(min=0).sqrt(), eps)
    scale_G = torch.where(too_few_G | (stats.max == torch.inf), torch.nan, scale_G)
    return rows.affine(stats.mean, scale_G.to(rows.dtype))
