"""Losses over pairs without a reference: contrast of log-probs and likelihood of a response.

All take summed log-probs per response, in nats, and token counts. S is such a sum, m its mean per
token (sum / count, 0 for an empty response).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import relu

from fastpo.inputs import Trained
from fastpo.losses._common import (
    NLL_MEANS,
    REDUCTIONS,
    LossOutput,
    NllMean,
    Reduction,
    check_choice,
    check_finite,
    check_label_smoothing,
    check_not_negative,
    check_positive,
    fail,
    mean_logprobs,
    negative_log_likelihood,
    pair_output,
    prepare,
    reduce,
)
from fastpo.losses.margins import soft_logistic, squared

Contrast = Literal["sigmoid", "hinge", "ipo"]


def _contrast(
    loss: str,
    form: str,
    sums: tuple[Tensor, Tensor],
    means: tuple[Tensor, Tensor],
    beta: float,
    label_smoothing: float,
    gamma: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B] loss and rewards of one form: sums for sigmoid and hinge, means for the others."""
    check_label_smoothing(loss, label_smoothing)
    if label_smoothing and form in ("hinge", "ipo"):
        remedy = "Only logistic forms can be smoothed."
        raise fail(loss, "label_smoothing", f"0 with form {form}", repr(label_smoothing), remedy)
    chosen_B, rejected_B = sums if form in ("sigmoid", "hinge") else means
    rewards = beta * chosen_B, beta * rejected_B
    if form == "ipo":
        return squared(chosen_B - rejected_B, 1 / (2 * beta)), *rewards
    margin_B = beta * (chosen_B - rejected_B)
    if form == "hinge":
        return relu(1 - margin_B), *rewards
    return soft_logistic(margin_B - gamma, 1 - label_smoothing), *rewards


def _statistics(
    loss: str,
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    chosen_counts: Tensor,
    rejected_counts: Tensor,
    beta: float,
    nll_mean: NllMean,
    reduction: Reduction,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Checks shared by this module; then sums, means and the [B] terms of the chosen's NLL."""
    check_positive(loss, "beta", beta)
    check_choice(loss, "nll_mean", nll_mean, NLL_MEANS)
    check_choice(loss, "reduction", reduction, REDUCTIONS)
    chosen_B, rejected_B, chosen_counts_B, rejected_counts_B = prepare(
        loss,
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        chosen_counts=chosen_counts,
        rejected_counts=rejected_counts,
    )
    means = mean_logprobs(chosen_B, chosen_counts_B), mean_logprobs(rejected_B, rejected_counts_B)
    nll_B = negative_log_likelihood(chosen_B, chosen_counts_B, nll_mean)
    return (chosen_B, rejected_B), means, nll_B


def cpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    chosen_counts: Tensor,
    rejected_counts: Tensor,
    beta: float = 0.1,
    cpo_alpha: float = 1.0,
    form: Contrast = "sigmoid",
    label_smoothing: float = 0.0,
    nll_mean: NllMean = "token_mean",
    reduction: Reduction = "mean",
) -> LossOutput:
    """Contrastive preference optimisation: DPO with a uniform reference, plus likelihood.

    -logsigmoid(beta (S_chosen - S_rejected)) + cpo_alpha NLL(chosen)  (arXiv:2401.08417, eq. 3
    and 5). TRL's CPO trainer has two more forms on the same margin: ``hinge``
    max(0, 1 - beta (S_chosen - S_rejected)) and ``ipo``, which takes means,
    (m_chosen - m_rejected - 1 / (2 beta))^2.

    Args:
        policy_chosen: [B] summed log-probs of the chosen responses, any float dtype, nats.
        policy_rejected: [B] the same of the rejected responses.
        chosen_counts: [B] tokens of the chosen responses.
        rejected_counts: [B] tokens of the rejected responses.
        beta: scale of the log-probs, > 0.
        cpo_alpha: weight of the likelihood term, >= 0.
        form: ``sigmoid``, ``hinge`` or ``ipo``.
        label_smoothing: e, assumed share of flipped labels, in [0, 0.5); with ``sigmoid`` alone.
        nll_mean: ``token_mean`` over the tokens of the batch (TRL), or ``sequence_mean``.
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Returns:
        LossOutput; the rewards are beta S (beta m with ``ipo``); ``metrics["nll"]`` is the NLL.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> sums, counts = torch.tensor([[-2.5], [-2.7]]), torch.tensor([[3], [2]])
        >>> round(cpo(*sums, *counts, beta=0.5).loss.item(), 4)
        1.4777
    """
    check_not_negative("cpo", "cpo_alpha", cpo_alpha)
    check_choice("cpo", "form", form, ("sigmoid", "hinge", "ipo"))
    sums, means, nll_B = _statistics(
        "cpo", policy_chosen, policy_rejected, chosen_counts, rejected_counts,
        beta, nll_mean, reduction,
    )  # fmt: skip
    loss_B, *rewards = _contrast("cpo", form, sums, means, beta, label_smoothing)
    nll = reduce(nll_B, "mean")
    return pair_output(loss_B + cpo_alpha * nll_B, *rewards, reduction, nll=nll)


def cpo_simpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    chosen_counts: Tensor,
    rejected_counts: Tensor,
    beta: float = 2.0,
    gamma: float = 0.5,
    cpo_alpha: float = 1.0,
    label_smoothing: float = 0.0,
    nll_mean: NllMean = "token_mean",
    reduction: Reduction = "mean",
) -> LossOutput:
    """CPO-SimPO: SimPO plus the likelihood of the chosen response.

    z = beta (m_chosen - m_rejected) - gamma;  -logsigmoid(z) + cpo_alpha NLL(chosen), as TRL's CPO
    trainer has it with ``loss_type="simpo"`` (arXiv:2405.14734 joined to arXiv:2401.08417). TRL's
    default beta is 0.1, the one here is SimPO's.

    Args:
        policy_chosen: [B] summed log-probs of the chosen responses, nats.
        policy_rejected: [B] the same of the rejected responses.
        chosen_counts: [B] tokens of the chosen responses.
        rejected_counts: [B] tokens of the rejected responses.
        beta: scale of the mean log-probs, > 0.
        gamma: target margin, on the scale of the rewards.
        cpo_alpha: weight of the likelihood term, >= 0.
        label_smoothing: e in [0, 0.5); the target margin is not flipped with the label.
        nll_mean: ``token_mean`` or ``sequence_mean``.
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Result and errors are those of :func:`cpo`; the rewards are beta m.

    Example:
        >>> sums, counts = torch.tensor([[-2.5], [-2.7]]), torch.tensor([[3], [2]])
        >>> round(cpo_simpo(*sums, *counts).loss.item(), 4)
        1.295
    """
    check_not_negative("cpo_simpo", "cpo_alpha", cpo_alpha)
    check_finite("cpo_simpo", "gamma", gamma)
    sums, means, nll_B = _statistics(
        "cpo_simpo", policy_chosen, policy_rejected, chosen_counts, rejected_counts,
        beta, nll_mean, reduction,
    )  # fmt: skip
    loss_B, *rewards = _contrast("cpo_simpo", "simpo", sums, means, beta, label_smoothing, gamma)
    nll = reduce(nll_B, "mean")
    return pair_output(loss_B + cpo_alpha * nll_B, *rewards, reduction, nll=nll)


def tpo_triple(
    policy_chosen: Trained,
    policy_rejected: Trained,
    extra: Trained,
    chosen_counts: Tensor,
    rejected_counts: Tensor,
    extra_counts: Tensor,
    beta: float = 0.01,
    tpo_alpha: float = 1.0,
    gamma: float = 0.5,
    form: Literal["sigmoid", "hinge", "ipo", "tpo_l"] = "sigmoid",
    label_smoothing: float = 0.0,
    nll_mean: NllMean = "token_mean",
    reduction: Reduction = "mean",
) -> LossOutput:
    """Triple preference optimisation: contrast of a pair plus likelihood of a third, gold response.

    -logsigmoid(beta (S_chosen - S_rejected)) + tpo_alpha NLL(gold)  (arXiv:2405.16681). ``tpo_l``
    is the length-normalised form, -logsigmoid(beta (m_chosen - m_rejected) - gamma); ``hinge`` and
    ``ipo`` are TRL's, as in :func:`cpo`.

    Args:
        policy_chosen: [B] summed log-probs of the chosen responses, nats.
        policy_rejected: [B] the same of the rejected responses.
        extra: [B] the same of the gold responses.
        chosen_counts: [B] tokens of the chosen responses.
        rejected_counts: [B] tokens of the rejected responses.
        extra_counts: [B] tokens of the gold responses.
        beta: scale of the log-probs, > 0.
        tpo_alpha: weight of the likelihood term, >= 0.
        gamma: target margin of ``tpo_l``.
        form: ``sigmoid``, ``hinge``, ``ipo`` or ``tpo_l``.
        label_smoothing: e in [0, 0.5), with ``sigmoid`` and ``tpo_l`` alone.
        nll_mean: ``token_mean`` or ``sequence_mean``.
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Result and errors are those of :func:`cpo`; with ``tpo_l`` the rewards are
    beta m.

    Example:
        >>> sums, counts = torch.tensor([[-2.5], [-2.7], [-1.2]]), torch.tensor([[3], [2], [2]])
        >>> round(tpo_triple(*sums, *counts).loss.item(), 4)
        1.2921
    """
    check_choice("tpo_triple", "form", form, ("sigmoid", "hinge", "ipo", "tpo_l"))
    check_not_negative("tpo_triple", "tpo_alpha", tpo_alpha)
    check_finite("tpo_triple", "gamma", gamma)
    sums, means, _ = _statistics(
        "tpo_triple", policy_chosen, policy_rejected, chosen_counts, rejected_counts,
        beta, nll_mean, reduction,
    )  # fmt: skip
    _, gold_B, counts_B = prepare(
        "tpo_triple", policy_chosen=sums[0], extra=extra, extra_counts=extra_counts
    )
    target = gamma if form == "tpo_l" else 0.0
    loss_B, *rewards = _contrast("tpo_triple", form, sums, means, beta, label_smoothing, target)
    nll_B = negative_log_likelihood(gold_B, counts_B, nll_mean)
    nll = reduce(nll_B, "mean")
    return pair_output(loss_B + tpo_alpha * nll_B, *rewards, reduction, nll=nll)
