"""Losses of reward models and of success predictors.

Scores [B] are outputs of the model that is trained and carry the gradient; the result's rewards are
the scores.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fastpo.checks import check_tensors
from fastpo.inputs import Trained
from fastpo.losses._common import (
    REDUCTIONS,
    LossOutput,
    Reduction,
    check_choice,
    check_flags,
    check_not_negative,
    check_share,
    fail,
    pair_output,
    prepare,
    reduce,
)
from fastpo.losses.margins import soft_logistic


def rm_bt(
    chosen_scores: Trained, rejected_scores: Trained, reduction: Reduction = "mean"
) -> LossOutput:
    """Bradley-Terry reward model: -logsigmoid(r_chosen - r_rejected)  (arXiv:2203.02155, eq. 1).

    Args:
        chosen_scores: [B] scores of the chosen responses, any float dtype.
        rejected_scores: [B] scores of the rejected responses.
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Returns:
        LossOutput; the rewards are the scores.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> round(rm_bt(torch.tensor([1.2]), torch.tensor([0.4])).loss.item(), 4)
        0.3711
    """
    check_choice("rm_bt", "reduction", reduction, REDUCTIONS)
    chosen_B, rejected_B = prepare(
        "rm_bt", chosen_scores=chosen_scores, rejected_scores=rejected_scores
    )
    return pair_output(soft_logistic(chosen_B - rejected_B), chosen_B, rejected_B, reduction)


def rm_margin(
    chosen_scores: Trained,
    rejected_scores: Trained,
    margins: Tensor,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Reward model with a margin by how clear the preference is.

    -logsigmoid(r_chosen - r_rejected - m)  (Llama 2, arXiv:2307.09288, eq. 2, whose four grades
    have margins 1, 2/3, 1/3 and 0 or three times these).

    Args:
        chosen_scores: [B] scores of the chosen responses, any float dtype.
        rejected_scores: [B] scores of the rejected responses.
        margins: [B] m; no gradient.
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Result and errors are those of :func:`rm_bt`.

    Example:
        >>> sums = torch.tensor([1.2]), torch.tensor([0.4]), torch.tensor([0.2])
        >>> round(rm_margin(*sums).loss.item(), 4)
        0.4375
    """
    check_tensors("losses.rm_margin", margins=margins)
    check_choice("rm_margin", "reduction", reduction, REDUCTIONS)
    chosen_B, rejected_B, margins_B = prepare(
        "rm_margin",
        chosen_scores=chosen_scores,
        rejected_scores=rejected_scores,
        margins=margins.detach(),
    )
    loss_B = soft_logistic(chosen_B - rejected_B - margins_B)
    return pair_output(loss_B, chosen_B, rejected_B, reduction)


def rm_center(
    chosen_scores: Trained,
    rejected_scores: Trained,
    margins: Tensor | None = None,
    coefficient: float = 0.01,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Reward model whose scores are drawn to a mean of zero.

    :func:`rm_bt`, or :func:`rm_margin` if margins are given, + c (r_chosen + r_rejected)^2
    (arXiv:2312.09244; TRL's reward trainer, where it is off by default). A constant on all scores
    changes only this term.

    Args:
        chosen_scores: [B] scores of the chosen responses, any float dtype.
        rejected_scores: [B] scores of the rejected responses.
        margins: [B] margins; 0 if not given.
        coefficient: c, >= 0.
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Result and errors are those of :func:`rm_bt`.

    Example:
        >>> round(rm_center(torch.tensor([1.2]), torch.tensor([0.4])).loss.item(), 4)
        0.3967
    """
    check_tensors("losses.rm_center", {"margins": margins}, chosen_scores=chosen_scores)
    check_not_negative("rm_center", "coefficient", coefficient)
    check_choice("rm_center", "reduction", reduction, REDUCTIONS)
    chosen_B, rejected_B, margins_B = prepare(
        "rm_center",
        chosen_scores=chosen_scores,
        rejected_scores=rejected_scores,
        margins=torch.zeros_like(chosen_scores) if margins is None else margins.detach(),
    )
    loss_B = soft_logistic(chosen_B - rejected_B - margins_B)
    centre_B = coefficient * (chosen_B + rejected_B).square()
    return pair_output(loss_B + centre_B, chosen_B, rejected_B, reduction)


def preference_strength(chosen_scores: Tensor, rejected_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread of the preference among several reward models, by pair.

    Mean and standard deviation over M models of r_chosen - r_rejected, both sums divided by M
    (arXiv:2401.06080, eq. 4; M = 10 there).

    Args:
        chosen_scores: [B, M] scores of the chosen responses by M >= 2 models.
        rejected_scores: [B, M] scores of the rejected responses.

    Returns:
        Strengths [B] and their standard deviations [B], without gradient.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> preference_strength(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]]))[0]
        tensor([1.5000])
    """
    check_tensors(
        "losses.preference_strength", chosen_scores=chosen_scores, rejected_scores=rejected_scores
    )
    shape = chosen_scores.shape
    if len(shape) != 2 or shape[1] < 2 or shape != rejected_scores.shape:
        got = f"{list(shape)} and {list(rejected_scores.shape)}"
        expected, remedy = "[B, M], M >= 2", "Score both responses by the same models."
        raise fail("preference_strength", "chosen_scores, rejected_scores", expected, got, remedy)
    dtype = torch.promote_types(chosen_scores.dtype, torch.float32)
    difference_BM = (chosen_scores.to(dtype) - rejected_scores.to(dtype)).detach()
    return difference_BM.mean(1), difference_BM.std(1, correction=0)


def flip_weakest(strengths: Tensor, fraction: float = 0.2) -> Tensor:
    """Pairs whose label is taken for wrong: the given share with the lowest strength.

    The rule is for a whole data set (arXiv:2401.06080: the lowest 20 %), not for a batch. Ties go
    by position.

    Args:
        strengths: [N] as from :func:`preference_strength`.
        fraction: share of the pairs, in [0, 1]; rounded down to whole pairs.

    Returns:
        [N] bool, True where the label is to be flipped.

    Raises:
        ValueError: the fraction is out of range.

    Example:
        >>> flip_weakest(torch.tensor([0.9, -0.4, 0.2]), fraction=0.34)
        tensor([False,  True, False])
    """
    check_tensors("losses.flip_weakest", strengths=strengths)
    if not 0 <= fraction <= 1:
        remedy = "The published share is 0.2."
        raise fail("flip_weakest", "fraction", "a number in [0, 1]", repr(fraction), remedy)
    count = math.floor(fraction * strengths.shape[0] + 1e-9)  # 100 * 0.29 is 29, not 28.99
    flipped = torch.zeros_like(strengths, dtype=torch.bool)
    return flipped.index_fill(0, strengths.argsort(stable=True)[:count], True)


FORMS = ("soft_label_margin", "label_smoothing", "adaptive_margin", "hard")


def rm_secrets2(
    chosen_scores: Trained,
    rejected_scores: Trained,
    strengths: Tensor,
    form: Literal[
        "soft_label_margin", "label_smoothing", "adaptive_margin", "hard"
    ] = "soft_label_margin",
    flipped: Tensor | None = None,
    smoothing: float | None = None,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Reward model on pairs with measured preference strength mu, D = r_chosen - r_rejected.

    -(1 - a) logsigmoid(u) - a logsigmoid(-u)  (arXiv:2401.06080, section 2.4)

    ===================== ====== =====================================
    form                  u      a
    ===================== ====== =====================================
    ``soft_label_margin`` D - mu ``smoothing`` where mu < 0, else 0
    ``label_smoothing``   D      ``smoothing`` on all pairs (eq. 5)
    ``adaptive_margin``   D - mu 0 (eq. 6, the margin in the sigmoid)
    ``hard``              D      0
    ===================== ====== =====================================

    Flipped pairs count with D and mu negated. The authors' code has -log(sigmoid(D) + 1e-5) for
    ``hard``.

    Args:
        chosen_scores: [B] scores of the chosen responses, any float dtype.
        rejected_scores: [B] scores of the rejected responses.
        strengths: [B] mu as from :func:`preference_strength`; no gradient.
        form: one of the above.
        flipped: [B] bool as from :func:`flip_weakest`; none if not given.
        smoothing: a in [0, 1] of the two forms that smooth, 0.1 if not given: the report has no
            value.
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Result and errors are those of :func:`rm_bt`; the rewards keep their sides where flipped.

    The report's contrastive terms (SimCSE or SwAV on the differences of features) and its
    meta-learning (MetaRM) are not here.

    Example:
        >>> sums = torch.tensor([1.2]), torch.tensor([0.4]), torch.tensor([0.9])
        >>> round(rm_secrets2(*sums).loss.item(), 4)
        0.7444
    """
    check_tensors("losses.rm_secrets2", {"flipped": flipped}, strengths=strengths)
    check_choice("rm_secrets2", "form", form, FORMS)
    smooths = form in FORMS[:2]
    if smoothing is not None and not smooths:
        remedy = "Leave it out, or take a form that smooths."
        raise fail("rm_secrets2", "smoothing", f"none with form={form!r}", smoothing, remedy)
    smoothing = 0.1 if smoothing is None else smoothing
    check_share("rm_secrets2", "smoothing", smoothing)
    check_choice("rm_secrets2", "reduction", reduction, REDUCTIONS)
    chosen_B, rejected_B, strengths_B = prepare(
        "rm_secrets2",
        chosen_scores=chosen_scores,
        rejected_scores=rejected_scores,
        strengths=strengths.detach(),
    )
    margin_B = chosen_B - rejected_B
    if flipped is not None:
        check_flags("rm_secrets2", "flipped", flipped, chosen_B)
        margin_B = torch.where(flipped, -margin_B, margin_B)
        strengths_B = torch.where(flipped, -strengths_B, strengths_B)
    if form in ("soft_label_margin", "adaptive_margin"):
        margin_B = margin_B - strengths_B
    label: Tensor | float = 1.0
    if form == "label_smoothing":
        label = 1 - smoothing
    elif form == "soft_label_margin":
        label = 1 - smoothing * (strengths_B < 0).to(margin_B)
    return pair_output(soft_logistic(margin_B, label), chosen_B, rejected_B, reduction)


def v0(
    chosen_scores: Trained,
    rejected_scores: Trained,
    chosen_labels: Tensor | None = None,
    rejected_labels: Tensor | None = None,
    alpha: float = 0.25,
    reduction: Reduction = "mean",
) -> LossOutput:
    """V0 value model: rank a context's successes over its failures and predict each.

    alpha (-logsigmoid(s_success - s_failure)) + (1 - alpha) times the mean of both queries'
    cross-entropies with sigmoid(s); a query's score s is the difference of its two logits
    (arXiv:2602.03584; the authors' code). Pairs are of one context, so an offset of the context
    leaves the first term alone. alpha is 0.25 in their script, 0.5 in their configuration. Their
    class weights, off by default, are not here.

    Args:
        chosen_scores: [B] scores of successful queries, any float dtype.
        rejected_scores: [B] scores of failed queries.
        chosen_labels: [B] soft labels (clip(reward, -1, 1) + 1) / 2; 1 if not given.
        rejected_labels: [B] the same of failed queries; 0 if not given.
        alpha: weight of the ranking term, in [0, 1].
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Result and errors are those of :func:`rm_bt`; ``metrics`` has ``rank`` and ``cross_entropy``.

    Example:
        >>> round(v0(torch.tensor([1.2, -0.3]), torch.tensor([0.4, 0.5])).loss.item(), 4)
        0.7562
    """
    check_tensors(
        "losses.v0",
        {"chosen_labels": chosen_labels, "rejected_labels": rejected_labels},
        chosen_scores=chosen_scores,
    )
    check_share("v0", "alpha", alpha)
    check_choice("v0", "reduction", reduction, REDUCTIONS)
    ones = torch.ones_like(chosen_scores)
    chosen_B, rejected_B, chosen_labels_B, rejected_labels_B = prepare(
        "v0",
        chosen_scores=chosen_scores,
        rejected_scores=rejected_scores,
        chosen_labels=ones if chosen_labels is None else chosen_labels,
        rejected_labels=0 * ones if rejected_labels is None else rejected_labels,
    )
    rank_B = soft_logistic(chosen_B - rejected_B)
    entropy_B = soft_logistic(chosen_B, chosen_labels_B)
    entropy_B = (entropy_B + soft_logistic(rejected_B, rejected_labels_B)) / 2
    loss_B = alpha * rank_B + (1 - alpha) * entropy_B
    parts = {"rank": reduce(rank_B, "mean"), "cross_entropy": reduce(entropy_B, "mean")}
    return pair_output(loss_B, chosen_B, rejected_B, reduction, **parts)
