"""Losses over pairs that weigh each pair, or choose the strength of a batch.

The weights come from ``fastpo.weights``; none carries a gradient. a and b are the log-ratios of
chosen and rejected, and d = a - b.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpo.checks import check_tensors
from fastpo.inputs import Trained
from fastpo.losses._common import (
    REDUCTIONS,
    LossOutput,
    Reduction,
    check_choice,
    fail,
    log_ratios,
    pair_output,
    prepare,
    reduce,
)
from fastpo.losses.margins import soft_logistic
from fastpo.losses.pairwise import dpo
from fastpo.weights.samples import madpo_weights


def wpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_weights: Tensor,
    rejected_weights: Tensor,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Weighted preference optimisation: DPO where a pair counts as likely as the policy writes it.

    -w_chosen w_rejected logsigmoid(beta d)  (arXiv:2406.11827), weights not renormalised over the
    batch, as in TRL.

    Args:
        chosen_weights: [B] of :func:`fastpo.weights.wpo_weights`; they get no gradient.
        rejected_weights: [B] of the rejected responses.

    Other arguments, result and errors are those of :func:`dpo`; the metric ``weights`` is the mean
    weight of a pair.

    Example:
        >>> import torch
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2, 0.5, 0.8)]
        >>> round(wpo(*sums, beta=0.5).loss.item(), 4)
        0.2134
    """
    check_choice("wpo", "reduction", reduction, REDUCTIONS)
    names = dict(chosen_weights=chosen_weights, rejected_weights=rejected_weights)
    out = dpo(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction="none")
    loss_B, chosen_B, rejected_B = prepare("wpo", policy_chosen=out.loss, **names)
    weights_B = (chosen_B * rejected_B).detach()
    mean = reduce(weights_B, "mean")
    return pair_output(
        loss_B * weights_B, out.chosen_rewards, out.rejected_rewards, reduction, weights=mean
    )


def madpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    c_max: float = 2.0,
    c_min: float | None = None,
    steepness: float = 1.0,
    threshold: float = math.log(999),
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Margin-adaptive DPO: DPO weighted by how close a reward model finds the pair.

    -w logsigmoid(beta d), w of :func:`fastpo.weights.madpo_weights` (arXiv:2510.05342, the authors'
    code). c_max = 1 is DPO.

    Args:
        chosen_scores: [B] scores of the chosen responses, of a reward model in log-odds; they get
            no gradient.
        rejected_scores: [B] of the rejected ones.
        c_max, c_min, steepness, threshold: as of the weights.

    Other arguments, result and errors are those of :func:`dpo` and of the weights; the metric
    ``weights`` is their mean.

    Example:
        >>> import torch
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2, 0.5, 0.0)]
        >>> round(madpo(*sums, threshold=2.0, beta=0.5).loss.item(), 4)
        0.5854
    """
    check_choice("madpo", "reduction", reduction, REDUCTIONS)
    names = dict(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    out = dpo(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction="none")
    loss_B, chosen_B, rejected_B = prepare("madpo", policy_chosen=out.loss, **names)
    weights_B = madpo_weights(chosen_B, rejected_B, c_max, c_min, steepness, threshold)
    mean = reduce(weights_B, "mean")
    return pair_output(
        loss_B * weights_B, out.chosen_rewards, out.rejected_rewards, reduction, weights=mean
    )


def beta_dpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    batch_beta: Tensor,
    pair_weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> LossOutput:
    """DPO with a beta that follows the batch, on the pairs that the batch keeps.

    -w logsigmoid(beta_batch d)  (arXiv:2407.08639). Both come from a
    :class:`fastpo.weights.BetaDPO`, which has the running statistics and the draw.

    Args:
        batch_beta: 0-d, > 0; it gets no gradient.
        pair_weights: [B] 0 for a dropped pair and B / kept for the others; None keeps all.

    Other arguments, result and errors are those of :func:`dpo`; the metric ``beta`` is the batch's.

    Example:
        >>> import torch
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2)]
        >>> round(beta_dpo(*sums, torch.tensor(0.5)).loss.item(), 4)
        0.5334
    """
    if not isinstance(batch_beta, Tensor) or batch_beta.ndim:
        got = f"{list(batch_beta.shape)}" if isinstance(batch_beta, Tensor) else repr(batch_beta)
        remedy = "Take it from fastpo.weights.BetaDPO; dpo takes a number."
        raise fail("beta_dpo", "batch_beta", "a 0-d tensor", got, remedy)
    chosen_B, rejected_B = log_ratios(
        "beta_dpo", policy_chosen, policy_rejected, ref_chosen, ref_rejected, 1.0, reduction
    )
    beta = batch_beta.detach().to(chosen_B)
    loss_B = -logsigmoid(beta * (chosen_B - rejected_B))
    if pair_weights is not None:
        names = dict(policy_chosen=loss_B, pair_weights=pair_weights.detach())
        loss_B, weights_B = prepare("beta_dpo", **names)
        loss_B = loss_B * weights_B
    return pair_output(loss_B, beta * chosen_B, beta * rejected_B, reduction, beta=beta)


def re_po(
    policy_chosen: Trained,
    policy_rejected: Trained,
    reliability: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    chosen_counts: Tensor | None = None,
    rejected_counts: Tensor | None = None,
    loss: Callable[..., LossOutput] = dpo,
    beta: float = 0.1,
    reduction: Reduction = "mean",
    **options,
) -> LossOutput:
    """RE-PO: any loss over pairs, with labels that are right only with some probability.

    p = sigmoid(L(rejected > chosen) - L(chosen > rejected)) is what the policy believes of a label
    under the loss L, q = p eta / (p eta + (1 - p) (1 - eta)) what it then is with an annotator of
    reliability eta, and the result is -[q log p + (1 - q) log(1 - p)], q without gradient
    (arXiv:2509.24159). L is evaluated twice, the second time with the roles swapped. For
    likelihoods (dpo, cpo without its NLL) eta = 1 gives L back; for others, such as ipo, -log p
    is a surrogate.

    Args:
        reliability: [B] eta of each pair's annotator, of :class:`fastpo.weights.RePO`, to whose
            ``update`` the metric ``posteriors`` (q) goes; it gets no gradient.
        ref_chosen: [B], for losses that take it; the same holds of the next three. What ``loss``
            does not take is left out.
        loss: a loss over pairs of this package, called by keywords.
        options: further options of ``loss``.

    Rewards are those of ``loss``. Other arguments, result and errors are those of :func:`dpo`.

    Example:
        >>> import torch
        >>> names = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
        >>> sums = dict(zip(names, (torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2))))
        >>> round(re_po(**sums, reliability=torch.tensor([0.9]), beta=0.5).loss.item(), 4)
        0.5588
    """
    check_tensors("losses.re_po", policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    check_choice("re_po", "reduction", reduction, REDUCTIONS)
    pairs = {
        "policy_": (policy_chosen, policy_rejected),
        "ref_": (ref_chosen, ref_rejected),
        "_counts": (chosen_counts, rejected_counts),
    }
    known = inspect.signature(loss).parameters
    straight, swapped = {}, {}
    for part, (chosen, rejected) in pairs.items():
        names = [part + x if part[-1] == "_" else x + part for x in ("chosen", "rejected")]
        if chosen is not None and rejected is not None and all(name in known for name in names):
            straight |= dict(zip(names, (chosen, rejected), strict=True))
            swapped |= dict(zip(names, (rejected, chosen), strict=True))
    options |= dict(beta=beta, reduction="none")
    out = loss(**straight, **options)
    loss_B, swapped_B, reliability_B = prepare(
        "re_po",
        policy_chosen=out.loss,
        policy_rejected=loss(**swapped, **options).loss,
        reliability=reliability,
    )
    margin_B = swapped_B - loss_B
    # q is the sum of both log-odds: no p and no 1 - p that could round to 0. As a label it is
    # detached.
    posteriors_B = torch.sigmoid(margin_B + torch.logit(reliability_B))
    loss_B = soft_logistic(margin_B, posteriors_B)
    return pair_output(
        loss_B, out.chosen_rewards, out.rejected_rewards, reduction, posteriors=posteriors_B
    )
