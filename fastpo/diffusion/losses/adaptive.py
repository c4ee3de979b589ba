"""Losses over pairs that weigh or turn them by scores, by errors or by each other.

In the terms of :mod:`fastpo.diffusion.losses.pairs`: a and b are the gains on the reference of
chosen and rejected. No weight, sign or share carries a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpo.diffusion.losses._common import check_scale, error_gains, prepare_errors
from fastpo.diffusion.losses.pairs import dpo
from fastpo.losses._common import LossOutput, Reduction, fail, pair_output
from fastpo.losses.margins import soft_logistic

# Of PickScore, by which the code of SmPO brings scores to [0, 1].
PICKSCORE_LOWEST = 0.11543526500463486
PICKSCORE_HIGHEST = 0.28201571106910706


def smpo_weights(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    gamma: float = 10.0,
    lowest: float = PICKSCORE_LOWEST,
    highest: float = PICKSCORE_HIGHEST,
    first_pair: bool = False,
) -> Tensor:
    """SmPO: pairs that a reward model finds close count less.

    w = gamma (2 p - 1) with p = sigmoid(r_chosen - r_rejected), the probability that chosen wins,
    and r = (score - lowest) / (highest - lowest)  (arXiv:2506.02698, the authors' code). A pair
    whose rejected sample has the higher score gets a negative weight, which turns it: the code's
    relabelling of pairs by their scores. A tie gets 0.

    Args:
        chosen_scores: [B] scores of the chosen samples, of PickScore.
        rejected_scores: [B] of the rejected ones.
        gamma: largest weight, > 0.
        lowest: score that becomes 0.
        highest: score that becomes 1, > lowest.
        first_pair: give the size of the first pair's weight to all, as the published code does; it
            is written for one pair per device. Each pair keeps its sign.

    Returns:
        [B] float32, or float64 if the scores are, for ``weights`` of :func:`dpo`.

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> smpo_weights(torch.tensor([0.22, 0.20]), torch.tensor([0.20, 0.20]))
        tensor([0.5996, 0.0000])
    """
    name = "diffusion.losses.smpo_weights"
    check_scale(name, "gamma", gamma)
    if not lowest < highest:
        remedy = "Leave both out for the range of PickScore."
        raise fail(name, "lowest, highest", "lowest < highest", f"{lowest}, {highest}", remedy)
    remedy = "Give one score per sample."
    chosen_B, rejected_B = prepare_errors(
        name, remedy=remedy, chosen_scores=chosen_scores, rejected_scores=rejected_scores
    )
    margin_B = (chosen_B - rejected_B).detach() / (highest - lowest)
    weights_B = gamma * torch.tanh(margin_B / 2)  # 2 sigmoid(x) - 1, exact near 0
    if first_pair:
        size_B = weights_B[:1].abs().expand_as(weights_B)
        return torch.where(weights_B < 0, -size_B, size_B)
    return weights_B


def smpo(
    chosen_errors: Tensor,
    rejected_errors: Tensor,
    ref_chosen_errors: Tensor,
    ref_rejected_errors: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    beta: float = 2000.0,
    kappa: float = 0.5,
    gamma: float = 10.0,
    lowest: float = PICKSCORE_LOWEST,
    highest: float = PICKSCORE_HIGHEST,
    first_pair: bool = False,
    reduction: Reduction = "mean",
) -> LossOutput:
    """SmPO-Diffusion: Diffusion-DPO with smooth labels from a reward model as weights.

    -logsigmoid(kappa beta gamma (2 p - 1) (a - b))  (arXiv:2506.02698, the authors' code), p by
    :func:`smpo_weights`; of a p from elsewhere, :func:`dpo` takes the weights gamma (2 p - 1).
    The target is that of ReNoise inversion, :func:`fastpo.diffusion.targets.inverted`. p = 1 and
    gamma = 1 is :func:`dpo`; p = 1/2 gives log 2 and no gradient.

    Args:
        chosen_scores: [B] scores of the chosen samples, of PickScore.
        rejected_scores: [B] of the rejected ones.
        beta: > 0; 2000 for SD 1.5 and 5000 for SDXL in the code.
        gamma, lowest, highest, first_pair: see :func:`smpo_weights`.

    Other arguments, result and errors are those of :func:`dpo`.

    Example:
        >>> errors = torch.tensor([[0.10], [0.30], [0.12], [0.25]])
        >>> out = smpo(*errors, torch.tensor([0.22]), torch.tensor([0.20]), beta=10.0)
        >>> round(out.loss.item(), 4)
        0.5937
    """
    name, remedy = "diffusion.losses.smpo", "Give one number per sample."
    prepare_errors(name, remedy=remedy, chosen_errors=chosen_errors, chosen_scores=chosen_scores)
    weights_B = smpo_weights(chosen_scores, rejected_scores, gamma, lowest, highest, first_pair)
    errors = chosen_errors, rejected_errors, ref_chosen_errors, ref_rejected_errors
    return dpo(*errors, beta=beta, kappa=kappa, weights=weights_B, reduction=reduction)


def seppo(
    chosen_errors: Tensor,
    rejected_errors: Tensor,
    ref_chosen_errors: Tensor,
    ref_rejected_errors: Tensor,
    beta: float = 5000.0,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> LossOutput:
    """SePPO: samples of the reference are losers only where the reference is the worse model.

    -logsigmoid(beta w (a - s b)), s = 1 where the policy's error on the chosen sample is at most
    the reference's, else -1  (arXiv:2410.05255, eq. 7 and 8). With s = -1 the reference's sample
    counts as a second winner, inside the one sigmoid. Where both errors are equal, as everywhere at
    the start, s is 1. The reference is a random one of the last K = 7 checkpoints of the policy,
    which are taken every 30 updates.

    Args:
        rejected_errors: [B] errors on samples that the reference generated.
        ref_rejected_errors: [B] of the reference on its own samples.
        beta: the paper's beta T, > 0.

    Other arguments and errors are those of :func:`dpo`.

    Returns:
        LossOutput; the rewards are beta a and beta b.

    Experimental: the equations come from reviews that quote them, the published code has no
    training, and the default of beta is Diffusion-DPO's.

    Example:
        >>> out = seppo(torch.tensor([0.20]), torch.tensor([0.31]), torch.tensor([0.15]),
        ...             torch.tensor([0.29]), beta=2.0)
        >>> round(out.loss.item(), 4)
        0.7656
    """
    name = "diffusion.losses.seppo"
    check_scale(name, "beta", beta)
    chosen_B, rejected_B, weights_B = error_gains(
        name, chosen_errors, rejected_errors, ref_chosen_errors, ref_rejected_errors, weights,
        reduction,
    )  # fmt: skip
    turned_B = torch.where(chosen_B >= 0, rejected_B, -rejected_B)
    loss_B = soft_logistic(beta * weights_B * (chosen_B - turned_B))
    return pair_output(loss_B, beta * chosen_B, beta * rejected_B, reduction)


def _shares(losses_K: Tensor) -> Tensor:
    """Each loss over their sum, constants; uniform where the sum is 0."""
    losses_K = losses_K.detach()
    total = losses_K.sum()
    return torch.where(total == 0, 1 / max(losses_K.shape[0], 1), losses_K / total)


def adaptive_balance(losses: Sequence[Tensor]) -> Tensor:
    """Sum of losses, each weighed by its share of the sum: the larger one pulls the harder.

    sum_k alpha_k L_k,  alpha_k = L_k / sum_j L_j, without gradient  (the weights of
    arXiv:2511.19268 for two losses, in their later form for any number). Losses that sum to 0 get
    equal weights.

    Args:
        losses: 0-d tensors, >= 0.

    Returns:
        0-d tensor, float32 or float64.

    Raises:
        ValueError: there is none, or one is not 0-d.

    Example:
        >>> round(adaptive_balance([torch.tensor(0.9), torch.tensor(0.3)]).item(), 4)
        0.75
    """
    shapes = [list(loss.shape) for loss in losses]
    if not shapes or any(shapes):
        got = f"tensors {shapes}"
        remedy = "Reduce each loss to one number."
        raise fail(
            "diffusion.losses.adaptive_balance", "losses", "0-d tensors, at least one", got, remedy
        )
    losses_K = torch.stack(list(losses))
    losses_K = losses_K.to(torch.promote_types(losses_K.dtype, torch.float32))
    return (_shares(losses_K) * losses_K).sum()


def bide_dpo(
    chosen_errors: Tensor,
    rejected_errors: Tensor,
    ref_chosen_errors: Tensor,
    ref_rejected_errors: Tensor,
    beta: float = 5000.0,
    kappa: float = 0.5,
    reduction: Reduction = "mean",
) -> LossOutput:
    """BideDPO: Diffusion-DPO on several pairs per sample, balanced by the size of their losses.

    sum_k alpha_k L_k, with L_k the :func:`dpo` loss of pair k and alpha_k its share of
    :func:`adaptive_balance` by the means over the batch  (arXiv:2511.19268). There k = 2: a pair
    that differs in how it follows the text, and one that differs in how it follows the condition
    map, which is taken from the first pair's winner.

    Args:
        chosen_errors: [B, K] errors of the chosen samples of each pair.
        rejected_errors: [B, K] of the rejected samples.
        ref_chosen_errors: [B, K] of the reference on the chosen samples.
        ref_rejected_errors: [B, K] of the reference on the rejected samples.

    Other arguments and errors are those of :func:`dpo`.

    Returns:
        LossOutput; the rewards are means over the K pairs, and the metric ``shares`` is alpha [K].

    The paper's beta was not read: this is Diffusion-DPO's.

    Example:
        >>> errors = torch.tensor([[[0.10, 0.20]], [[0.30, 0.20]], [[0.12, 0.30]], [[0.25, 0.20]]])
        >>> out = bide_dpo(*errors, beta=10.0)
        >>> round(out.loss.item(), 4), [round(x, 3) for x in out.metrics["shares"].tolist()]
        (0.5055, [0.529, 0.471])
    """
    name = "diffusion.losses.bide_dpo"
    check_scale(name, "beta", beta)
    check_scale(name, "kappa", kappa)
    chosen_BK, rejected_BK, _ = error_gains(
        name, chosen_errors, rejected_errors, ref_chosen_errors, ref_rejected_errors, None,
        reduction, "[B, K]",
    )  # fmt: skip
    scale = kappa * beta
    loss_BK = soft_logistic(scale * (chosen_BK - rejected_BK))
    shares_K = _shares(loss_BK.sum(0))
    rewards = (scale * gains_BK.mean(1) for gains_BK in (chosen_BK, rejected_BK))
    return pair_output((shares_K * loss_BK).sum(1), *rewards, reduction, shares=shares_K)
