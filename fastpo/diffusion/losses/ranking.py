"""Losses that order samples: a hinge on pairs of expert and policy, and weighted lists.

Errors are those of ``fastpo.diffusion.noise_errors``, lower for likelier samples.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpo.checks import check_tensors
from fastpo.diffusion.losses._common import check_scale, error_gains
from fastpo.losses._common import (
    REDUCTIONS,
    LossOutput,
    Reduction,
    UnpairedOutput,
    check_choice,
    check_finite,
    fail,
    pair_output,
    unpaired_output,
)
from fastpo.losses._groups import prepare_groups


def ranking_hinge(
    chosen_errors: Tensor,
    rejected_errors: Tensor,
    ref_chosen_errors: Tensor,
    ref_rejected_errors: Tensor,
    margin: float = 1e-3,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Diffusion-DRO: errors of experts, relative to the reference, below those of own samples.

    max(0, (e_w - r_w) - (e_l - r_l) + margin) (arXiv:2510.18353, the authors' code). The chosen
    samples are experts with fresh noise; the rejected ones states that a lagged copy of the model
    passed while it sampled, and their target is the noise that it predicted there. No sigmoid
    scales the gradient, which is why there is no beta. At a tie of the two sides, exactly, the
    gradient is half, as that of ``torch.maximum`` in the code.

    Args:
        chosen_errors: [B] errors e_w of the policy, float.
        rejected_errors: [B] errors e_l.
        ref_chosen_errors: [B] errors r_w of the reference to the same targets; no gradient.
        ref_rejected_errors: [B] errors r_l.
        margin: by how much errors of experts have to lie below.
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Returns:
        LossOutput; the rewards are r - e.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> out = ranking_hinge(torch.tensor([0.5]), torch.tensor([0.3]), torch.tensor([0.4]),
        ...                     torch.tensor([0.4]))
        >>> round(out.loss.item(), 4)
        0.201
    """
    name = "diffusion.losses.ranking_hinge"
    check_finite(name, "margin", margin)
    chosen_B, rejected_B, _ = error_gains(
        name,
        chosen_errors,
        rejected_errors,
        ref_chosen_errors,
        ref_rejected_errors,
        weights=None,
        reduction=reduction,
    )
    short_B = rejected_B - chosen_B + margin
    loss_B = torch.maximum(short_B, short_B.new_zeros(()))
    return pair_output(loss_B, chosen_B, rejected_B, reduction)


def preference_shares(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """RankDPO's psi: the share of duels a sample wins in its list, over several reward models.

    psi_i = C_i / (n (k - 1)), C_i the number of reward models and opponents j with
    score_i > score_j; a tie counts for neither (arXiv:2410.18013, section 3).

    Args:
        scores: [B, G, n] scores of G samples by n reward models, each in units of its own.
        mask: [B, G] bool, True where there is a sample; all of them if not given.

    Returns:
        [B, G] shares in [0, 1], in the scores' dtype but at least float32; 0 at padding.

    Raises:
        ValueError: a shape does not fit.

    Example:
        >>> preference_shares(torch.tensor([[[0.3, 21.0], [0.2, 20.0], [0.1, 20.5]]]))
        tensor([[1.0000, 0.2500, 0.2500]])
    """
    check_tensors("diffusion.losses.preference_shares", {"mask": mask}, scores=scores)
    name = "diffusion.losses.preference_shares"
    if scores.ndim != 3 or not scores.shape[2]:
        remedy = "Stack the reward models in a last dimension; one alone is [B, G, 1]."
        raise fail(name, "scores", "[B, G, n]", f"{list(scores.shape)}", remedy)
    first_BG, mask_BG = prepare_groups(name, mask, scores=scores[:, :, 0])
    duels_BGG = mask_BG[:, :, None] & mask_BG[:, None, :]
    wins_BGGn = (scores[:, :, None] > scores[:, None]) & duels_BGG[..., None]
    duels_B1 = scores.shape[2] * (mask_BG.sum(1, keepdim=True) - 1).clamp(min=1)
    return wins_BGGn.sum((2, 3)).to(first_BG.dtype) / duels_B1


def _ranks(values_BG: Tensor, mask_BG: Tensor) -> Tensor:
    """1 for the largest of each list; ties are ranked in the order given, padding comes last."""
    order_BG = values_BG.masked_fill(~mask_BG, -torch.inf).argsort(
        dim=1, descending=True, stable=True
    )
    places_G = torch.arange(1, values_BG.shape[1] + 1, device=values_BG.device)
    return torch.zeros_like(order_BG).scatter(1, order_BG, places_G.expand_as(order_BG))


def rank_dpo(
    errors: Tensor,
    ref_errors: Tensor,
    shares: Tensor,
    mask: Tensor | None = None,
    beta: float = 5000.0,
    rank_from: Literal["labels", "errors"] = "labels",
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """RankDPO: DPO over all pairs of a list, weighted by what a swap would cost its DCG.

    -sum over i preferred to j of Delta_ij logsigmoid(-beta (s_i - s_j)), s = e - r,
    Delta_ij = |2^psi_i - 2^psi_j| |1 / log(1 + tau_i) - 1 / log(1 + tau_j)| (arXiv:2410.18013,
    eq. 5-7 and Algorithm 2), tau the rank by psi. The sum is not divided by the number of pairs,
    and Delta carries no gradient. Pairs of equal psi weigh 0. Two samples give Diffusion-DPO
    (kappa 1) times |1 / log 2 - 1 / log 3| = 0.532 times the difference of their gains.

    Args:
        errors: [B, G] errors e of the policy at G samples per prompt, of one timestep.
        ref_errors: [B, G] errors r of the reference; no gradient.
        shares: [B, G] psi in [0, 1], from :func:`preference_shares`; no gradient.
        mask: [B, G] bool, True where there is a sample; all of them if not given.
        beta: strength of the tie to the reference, > 0; not stated in the paper, this is
            Diffusion-DPO's for mean errors.
        rank_from: ``labels`` ranks by psi, as text and algorithm; ``errors`` by s, as the caption
            of a figure has it.
        reduction: ``mean`` over prompts, ``sum`` or ``none``.

    Returns:
        UnpairedOutput; the rewards [B, G] are -beta s.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> out = rank_dpo(torch.tensor([[0.1, -0.05, 0.2]]), torch.zeros(1, 3),
        ...                torch.tensor([[0.9, 0.5, 0.2]]), beta=2.0)
        >>> round(out.loss.item(), 4)
        0.5388
    """
    check_tensors("diffusion.losses.rank_dpo", {"mask": mask}, shares=shares)
    name = "diffusion.losses.rank_dpo"
    check_scale(name, "beta", beta)
    check_choice(name, "rank_from", rank_from, ("labels", "errors"))
    check_choice(name, "reduction", reduction, REDUCTIONS)
    errors_BG, ref_errors_BG, shares_BG, mask_BG = prepare_groups(
        name, mask, errors=errors, ref_errors=ref_errors, shares=shares.detach()
    )
    rewards_BG = -beta * (errors_BG - ref_errors_BG.detach())
    ranked_BG = shares_BG if rank_from == "labels" else rewards_BG.detach()
    discounts_BG = _ranks(ranked_BG, mask_BG).to(shares_BG).log1p().reciprocal()
    gains_BG = shares_BG.exp2()
    gaps_BGG = gains_BG[:, :, None] - gains_BG[:, None, :]
    deltas_BGG = gaps_BGG * (discounts_BG[:, :, None] - discounts_BG[:, None, :]).abs()
    duels_BGG = mask_BG[:, :, None] & mask_BG[:, None, :] & (gaps_BGG > 0)
    margins_BGG = rewards_BG[:, :, None] - rewards_BG[:, None, :]
    losses_BGG = torch.where(duels_BGG, -deltas_BGG * logsigmoid(margins_BGG), 0.0)
    return unpaired_output(losses_BGG.sum((1, 2)), rewards_BG, reduction)
