"""Losses over pairs with a further stream of log-probs: exploration bonuses, and acceleration.

All take summed log-probs per response, in nats, prompt and padding left out. Below, a and b are the
log-ratios (policy minus reference) of chosen and rejected, d = a - b. References and earlier
policies never get a gradient.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fastpo.checks import check_tensors
from fastpo.inputs import Trained
from fastpo.losses._common import (
    LossOutput,
    Reduction,
    check_choice,
    check_not_negative,
    fail,
    log_ratios,
    pair_output,
    prepare,
    reduce,
)
from fastpo.losses.history import History
from fastpo.losses.margins import soft_logistic, squared


def _with_bonus(
    loss: str,
    sums: tuple[Tensor, ...],
    extra: Tensor,
    ref_extra: Tensor,
    beta: float,
    weight: float,
    form: str,
    reduction: Reduction,
) -> LossOutput:
    """A loss of beta d plus weight * (extra - ref_extra)."""
    chosen_B, rejected_B = log_ratios(loss, *sums, beta, reduction)
    chosen_B, rejected_B, extra_B, ref_extra_B = prepare(
        loss, policy_chosen=chosen_B, policy_rejected=rejected_B, extra=extra, ref_extra=ref_extra
    )
    margin_B = chosen_B - rejected_B
    if form == "ipo":
        loss_B = squared(margin_B, 1 / (2 * beta))
    else:
        loss_B = soft_logistic(beta * margin_B)
    bonus_B = weight * (extra_B - ref_extra_B.detach())
    rewards = beta * chosen_B, beta * rejected_B
    return pair_output(loss_B + bonus_B, *rewards, reduction, bonus=reduce(bonus_B, "mean"))


def selm(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    extra: Trained,
    ref_extra: Tensor,
    beta: float = 0.01,
    alpha: float = 1e-3,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Self-exploring language models: DPO with a bonus for leaving the current policy's answer.

    -logsigmoid(beta d) + alpha beta (log policy(x) - log ref(x))  (arXiv:2405.19332, the authors'
    code), x the greedy response of the policy this round starts from, which is the reference too.
    Minimising pushes x down. x may be one of the pair.

    Args:
        extra: [B] summed log-probs of x under the policy, with gradient.
        ref_extra: [B] the same under the reference.
        alpha: weight of the bonus, >= 0; the authors take 1e-3 and 1e-4.

    Other arguments, result and errors are those of :func:`dpo`; the metric ``bonus`` is the mean of
    the second term.

    Example:
        >>> sums = torch.tensor([[-12.0], [-14.5], [-13.0], [-14.0], [-20.0], [-19.5]])
        >>> round(selm(*sums).loss.item(), 4)
        0.6857
    """
    check_not_negative("selm", "alpha", alpha)
    sums = policy_chosen, policy_rejected, ref_chosen, ref_rejected
    return _with_bonus("selm", sums, extra, ref_extra, beta, alpha * beta, "logistic", reduction)


def xpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    extra: Trained,
    beta: float = 0.1,
    alpha: float = 1e-5,
    form: Literal["logistic", "ipo"] = "logistic",
    reduction: Reduction = "mean",
) -> LossOutput:
    """Exploratory preference optimisation: DPO (or IPO) with a bonus for leaving the reference.

    -logsigmoid(beta d) + alpha log policy(x), or (d - 1 / (2 beta))^2 + alpha log policy(x)
    (arXiv:2405.21046, in the form of TRL's trainer), x the response of the pair that was drawn from
    the reference. The bonus has neither beta nor a reference term: :func:`selm` with alpha / beta,
    up to a constant.

    Args:
        extra: [B] summed log-probs of x under the policy, with gradient: ``policy_chosen`` or
            ``policy_rejected``, whichever the reference wrote.
        alpha: weight of the bonus, >= 0.
        form: ``logistic``, or ``ipo`` on sums (not on token means as in TRL's DPO trainer).

    Other arguments, result and errors are those of :func:`dpo`; the metric ``bonus`` is the mean of
    the second term.

    Example:
        >>> sums = torch.tensor([[-12.0], [-14.5], [-13.0], [-14.0], [-20.0]])
        >>> round(xpo(*sums).loss.item(), 4)
        0.6208
    """
    check_tensors("losses.xpo", extra=extra)
    check_not_negative("xpo", "alpha", alpha)
    check_choice("xpo", "form", form, ("logistic", "ipo"))
    sums = policy_chosen, policy_rejected, ref_chosen, ref_rejected
    # The bonus is not relative to a reference: its stream is 0.
    return _with_bonus(
        "xpo", sums, extra, extra.new_zeros(extra.shape), beta, alpha, form, reduction
    )


def vpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    extra: Trained | None = None,
    ref_extra: Tensor | None = None,
    beta: float = 0.1,
    alpha: float = 0.01,
    setting: Literal["offline", "online"] = "offline",
    reduction: Reduction = "mean",
) -> LossOutput:
    """Value-incentivised preference optimisation: DPO with the optimal value as signed bonus.

    -logsigmoid(beta d) + s alpha beta (log policy(x) - log ref(x))  (arXiv:2405.19320), s = 1
    online (optimism), s = -1 offline (pessimism), x drawn from a calibration distribution: chosen
    responses offline, responses of the reference online. Offline on the chosen response it is DPO
    plus a likelihood term; with the policy's own response as x it is :func:`selm`.

    Args:
        extra: [B] summed log-probs of x under the policy, with gradient; both or neither. Offline
            they default to the chosen responses.
        ref_extra: [B] the same under the reference.
        alpha: weight of the value, >= 0.
        setting: ``offline`` or ``online``.

    Other arguments, result and errors are those of :func:`dpo`; the metric ``bonus`` is the mean of
    the second term.

    Experimental: the KL and its signs are confirmed by reviews; that it is weighed by alpha beta is
    derived from the stated principle (reward likelihood regularised by the optimal value, with mean
    reward 0 on the calibration distribution).

    Example:
        >>> sums = torch.tensor([[-12.0], [-14.5], [-13.0], [-14.0]])
        >>> round(vpo(*sums).loss.item(), 4)
        0.62
    """
    check_not_negative("vpo", "alpha", alpha)
    check_choice("vpo", "setting", setting, ("offline", "online"))
    if (extra is None) != (ref_extra is None) or (extra is None and setting == "online"):
        got, remedy = "None", "Sum the log-probs of a response of the reference under both models."
        raise fail("vpo", "extra, ref_extra", "both, or neither offline", got, remedy)
    if extra is None:
        extra, ref_extra = policy_chosen, ref_chosen
    weight = alpha * beta if setting == "online" else -alpha * beta
    sums = policy_chosen, policy_rejected, ref_chosen, ref_rejected
    return _with_bonus("vpo", sums, extra, ref_extra, beta, weight, "logistic", reduction)


def accelerated_po(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    history_chosen: History = (),
    history_rejected: History = (),
    beta: float = 0.1,
    alpha: float = 0.3,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Iterative DPO against an extrapolated reference, without building its parameters.

    -logsigmoid(beta d) with log ref' = (1 + alpha) log ref - alpha log previous in place of log ref
    (arXiv:2410.06293): ref is the model that the last round trained, previous the one of the round
    before. The normaliser of ref' cancels in d. It equals the extrapolation of parameters only
    where log-probs are linear in them.

    Args:
        history_chosen: the first entry is the previous model's [B]; empty in the first round, which
            is then DPO.
        history_rejected: likewise.
        alpha: extrapolation, >= 0; 0 is iterative DPO.

    Other arguments, result and errors are those of :func:`dpo`; the rewards are relative to ref'.

    Experimental: derived from the abstract's extrapolation step; the paper's equations and its
    alpha were not read. Not the anchored preference optimisation of the same acronym.

    Example:
        >>> out = accelerated_po(*torch.tensor([[-12.0], [-14.5], [-13.0], [-14.0]]),
        ...                      [torch.tensor([-12.5])], [torch.tensor([-14.2])])
        >>> round(out.loss.item(), 4)
        0.6113
    """
    check_not_negative("accelerated_po", "alpha", alpha)
    if len(history_chosen) != len(history_rejected):
        got, remedy = f"{len(history_chosen)} and {len(history_rejected)}", "Pass both sides."
        raise fail("accelerated_po", "history_chosen, history_rejected", "one length", got, remedy)
    chosen_B, rejected_B = log_ratios(
        "accelerated_po", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    if history_chosen:
        chosen_B, rejected_B, *streams = prepare(
            "accelerated_po",
            policy_chosen=chosen_B,
            policy_rejected=rejected_B,
            ref_chosen=ref_chosen.detach(),
            ref_rejected=ref_rejected.detach(),
            history_chosen=history_chosen[0].detach(),
            history_rejected=history_rejected[0].detach(),
        )
        ref_chosen_B, ref_rejected_B, previous_chosen_B, previous_rejected_B = streams
        chosen_B = chosen_B - alpha * (ref_chosen_B - previous_chosen_B)
        rejected_B = rejected_B - alpha * (ref_rejected_B - previous_rejected_B)
    loss_B = soft_logistic(beta * (chosen_B - rejected_B))
    return pair_output(loss_B, beta * chosen_B, beta * rejected_B, reduction)
