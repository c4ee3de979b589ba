"""Losses over pairs that are a cross-entropy of the margin with a soft label.

All take summed log-probs per response, in nats, prompt and padding left out. Below, a and b are the
log-ratios (policy minus reference) of chosen and rejected, d = a - b, and q is the probability that
chosen beats rejected. Neither the reference nor the label gets a gradient.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from fastpo.inputs import ESSENTIAL, Over, Trained
from fastpo.losses._common import (
    LossOutput,
    Reduction,
    check_choice,
    check_finite,
    log_ratios,
    pair_output,
    prepare,
)
from fastpo.losses.margins import soft_logistic, squared

_SUFFIX = Over("the tokens from the first one on that differs")
Suffix = Annotated[Trained, _SUFFIX]
RefSuffix = Annotated[Tensor, _SUFFIX]


def _soft_label_ce(
    loss: str, sums: tuple[Tensor, ...], label: Tensor, beta: float, reduction: Reduction
) -> LossOutput:
    chosen_B, rejected_B = log_ratios(loss, *sums, beta, reduction)
    chosen_B, rejected_B, label_B = prepare(
        loss, policy_chosen=chosen_B, policy_rejected=rejected_B, label=label
    )
    loss_B = soft_logistic(beta * (chosen_B - rejected_B), label_B)
    return pair_output(loss_B, beta * chosen_B, beta * rejected_B, reduction)


def soft_label_ce(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    label: Tensor,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """DPO with a soft label for every pair.

    -q logsigmoid(beta d) - (1 - q) logsigmoid(-beta d), the binary cross-entropy of q with the
    probability sigmoid(beta d) of DPO (arXiv:2305.18290). q = 1 is DPO, q = 1 - e conservative DPO.
    Its gradient in d is beta (sigmoid(beta d) - q); a label of 1/2 pulls d to 0.

    Args:
        label: [B] q, in [0, 1]; not checked, as that would wait for the device.

    Other arguments, result and errors are those of :func:`dpo`.

    Example:
        >>> out = soft_label_ce(*torch.tensor([[-2.5], [-2.7], [-2.7], [-2.2]]),
        ...                     label=torch.tensor([0.9]), beta=0.5)
        >>> round(out.loss.item(), 4)
        0.5684
    """
    sums = policy_chosen, policy_rejected, ref_chosen, ref_rejected
    return _soft_label_ce("soft_label_ce", sums, label, beta, reduction)


def osp(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    label: Tensor,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Online self-preferring: DPO with the strength of the model's own preference as soft label.

    -q logsigmoid(beta d) - (1 - q) logsigmoid(-beta d)  (arXiv:2405.14103), the form of
    :func:`soft_label_ce`. q comes from the model as its own judge, asked in both orders
    (:func:`fastpo.data.win_rates.judge_strengths`); the reference is the initial model.

    Args:
        label: [B] q, the judged strength of each pair, in [0, 1].

    Other arguments, result and errors are those of :func:`dpo`.

    Experimental: the paper's abstract names a soft-preference cross-entropy; its equation was not
    read, and beta is DPO's.

    Example:
        >>> out = osp(*torch.tensor([[-2.5], [-2.7], [-2.7], [-2.2]]),
        ...           label=torch.tensor([0.9]), beta=0.5)
        >>> round(out.loss.item(), 4)
        0.5684
    """
    sums = policy_chosen, policy_rejected, ref_chosen, ref_rejected
    return _soft_label_ce("osp", sums, label, beta, reduction)


def dno(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_win_rates: Tensor,
    rejected_win_rates: Tensor,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Direct Nash optimisation: soft labels from win rates against the current policy.

    The cross-entropy of :func:`soft_label_ce` with q = sigmoid(r_1 - r_2), r the win rate of a
    response against the policy of this iteration (arXiv:2404.03715, Algorithm 1); that policy is
    the reference. Pairs are not ordered: chosen and rejected are the first and second response. At
    policy = reference * exp(r / beta) / Z the gradient is 0 on average.

    The paper's practical form (Algorithm 2) is :func:`dpo` with the current policy as reference, on
    pairs whose scores lie far apart.

    Args:
        chosen_win_rates: [B] r_1, estimated against responses of the current policy.
        rejected_win_rates: [B] r_2.
        beta: the paper's eta, > 0; it gives no value for Algorithm 1.

    Other arguments, result and errors are those of :func:`dpo`.

    Example:
        >>> out = dno(*torch.tensor([[-12.0], [-14.5], [-13.0], [-14.0]]), torch.tensor([0.8]),
        ...           torch.tensor([0.3]))
        >>> round(out.loss.item(), 4)
        0.6776
    """
    chosen_win_rates_B, rejected_win_rates_B = prepare(
        "dno", chosen_win_rates=chosen_win_rates, rejected_win_rates=rejected_win_rates
    )
    label_B = torch.sigmoid(chosen_win_rates_B - rejected_win_rates_B)
    sums = policy_chosen, policy_rejected, ref_chosen, ref_rejected
    return _soft_label_ce("dno", sums, label_B, beta, reduction)


def mcts_dpo(
    policy_chosen: Suffix,
    policy_rejected: Suffix,
    ref_chosen: RefSuffix,
    ref_rejected: RefSuffix,
    chosen_counts: RefSuffix,
    rejected_counts: RefSuffix,
    label: Annotated[Tensor | None, ESSENTIAL] = None,
    beta: float = 0.1,
    form: Literal["logistic", "ipo"] = "logistic",
    length_exponent: float = 1.25,
    reduction: Reduction = "mean",
) -> LossOutput:
    """DPO on the branches of a search tree: suffixes, and labels from visit counts.

    All sums run from the first token where the two responses differ (arXiv:2405.00451, the authors'
    code). The loss is DPO, or conservative DPO by the label max(1/2, 1 / (1 + N_rejected / max(1,
    N_chosen))) of visit counts N (:func:`fastpo.data.search.visit_labels`), as in the released
    script. ``ipo`` is (a / n_chosen^p - b / n_rejected^p - 1 / (2 beta))^2, without a label.

    A pair with an empty suffix (equal responses, or one a prefix of the other) is left out, and the
    mean is over the rest.

    Args:
        chosen_counts: [B] tokens of the suffixes.
        rejected_counts: [B] likewise.
        label: [B] probability that chosen beats rejected; 1 if not given.
        form: ``logistic`` or ``ipo``.
        length_exponent: p, used by ``ipo``; the script's length penalty.

    Other arguments, result and errors are those of :func:`dpo`; a pair left out has loss 0.

    Example:
        >>> sums, counts = torch.tensor([[-12.0], [-14.5], [-13.0], [-14.0]]), torch.tensor([5])
        >>> out = mcts_dpo(*sums, counts, counts, label=torch.tensor([0.75]))
        >>> round(out.loss.item(), 4)
        0.6585
    """
    check_choice("mcts_dpo", "form", form, ("logistic", "ipo"))
    check_finite("mcts_dpo", "length_exponent", length_exponent)
    chosen_B, rejected_B = log_ratios(
        "mcts_dpo", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    chosen_B, rejected_B, chosen_counts_B, rejected_counts_B, label_B = prepare(
        "mcts_dpo",
        policy_chosen=chosen_B,
        policy_rejected=rejected_B,
        chosen_counts=chosen_counts,
        rejected_counts=rejected_counts,
        label=torch.ones_like(chosen_B) if label is None else label,
    )
    if form == "ipo":
        per_chosen_B = chosen_B / chosen_counts_B.clamp(min=1) ** length_exponent
        per_rejected_B = rejected_B / rejected_counts_B.clamp(min=1) ** length_exponent
        loss_B = squared(per_chosen_B - per_rejected_B, 1 / (2 * beta))
    else:
        loss_B = soft_logistic(beta * (chosen_B - rejected_B), label_B)
    kept_B = (chosen_counts_B > 0) & (rejected_counts_B > 0)
    return pair_output(loss_B, beta * chosen_B, beta * rejected_B, reduction, kept_B)
