"""Losses over pairs of responses, with a reference model.

All take summed log-probs per response, in nats: log p(response | prompt), prompt and padding left
out.
Below, a and b are the log-ratios (policy minus reference) of chosen and rejected, and d = a - b.
The reference never gets a gradient.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import relu

from fastpo.inputs import Trained
from fastpo.losses._common import (
    LossOutput,
    Reduction,
    check_choice,
    check_label_smoothing,
    fail,
    log_ratios,
    mean_logprobs,
    pair_output,
    prepare,
)
from fastpo.losses.margins import soft_logistic


def dpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Direct preference optimisation: logistic loss on the difference of log-ratios.

    -logsigmoid(beta d)  (arXiv:2305.18290, eq. 7). With label smoothing e this is conservative DPO,
    -(1 - e) logsigmoid(beta d) - e logsigmoid(-beta d)  (Mitchell 2023, "A note on DPO with noisy
    preferences and relationship to IPO"), whose minimum lies at beta d = log((1 - e) / e). It is
    not the unbiased estimate of robust DPO (arXiv:2403.00409).

    Args:
        policy_chosen: [B] summed log-probs of the chosen responses, any float dtype, nats.
        policy_rejected: [B] the same of the rejected responses.
        ref_chosen: [B] the same of the chosen responses under the reference model.
        ref_rejected: [B] the same of the rejected responses under the reference model.
        beta: strength of the tie to the reference, > 0.
        label_smoothing: e, assumed share of flipped labels, in [0, 0.5).
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Returns:
        LossOutput; the rewards are beta a and beta b.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> import torch
        >>> out = dpo(torch.tensor([-2.5]), torch.tensor([-2.7]), torch.tensor([-2.7]),
        ...           torch.tensor([-2.2]), beta=0.5)
        >>> round(out.loss.item(), 4), round(out.chosen_rewards.item(), 4)
        (0.5334, 0.1)
    """
    check_label_smoothing("dpo", label_smoothing)
    chosen_B, rejected_B = log_ratios(
        "dpo", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    loss_B = soft_logistic(beta * (chosen_B - rejected_B), 1 - label_smoothing)
    return pair_output(loss_B, beta * chosen_B, beta * rejected_B, reduction)


def hinge(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Hinge loss on the difference of log-ratios.

    max(0, 1 - beta d)  (RSO's hinge-norm, arXiv:2309.06657; SLiC-HF, arXiv:2305.10425, has the same
    form without the reference). Pairs with beta d > 1 get no gradient.

    Args:
        policy_chosen: [B] summed log-probs of the chosen responses, any float dtype, nats.
        policy_rejected: [B] the same of the rejected responses.
        ref_chosen: [B] the same of the chosen responses under the reference model.
        ref_rejected: [B] the same of the rejected responses under the reference model.
        beta: inverse of the margin that is asked for, in 1 / nats, > 0.
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Returns:
        LossOutput; the rewards are beta a and beta b.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> import torch
        >>> out = hinge(torch.tensor([-2.5]), torch.tensor([-2.7]), torch.tensor([-2.7]),
        ...             torch.tensor([-2.2]), beta=0.5)
        >>> round(out.loss.item(), 4)
        0.65
    """
    chosen_B, rejected_B = log_ratios(
        "hinge", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    loss_B = relu(1 - beta * (chosen_B - rejected_B))
    return pair_output(loss_B, beta * chosen_B, beta * rejected_B, reduction)


def ipo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_counts: Tensor | None = None,
    rejected_counts: Tensor | None = None,
    beta: float = 0.1,
    convention: Literal["averaged", "summed"] = "averaged",
    reduction: Reduction = "mean",
) -> LossOutput:
    """Identity preference optimisation: squared distance of the margin from 1 / (2 beta).

    ``summed`` is the form printed in the paper, (d - 1 / (2 beta))^2  (arXiv:2310.12036, eq. 17).
    ``averaged`` is the form of TRL's DPO trainer, (a / n_chosen - b / n_rejected - 1 / (2 beta))^2,
    which by TRL's source is the one behind the paper's results. The margin is then per token, so
    the two conventions ask for different beta.

    Args:
        policy_chosen: [B] summed log-probs of the chosen responses, any float dtype, nats.
        policy_rejected: [B] the same of the rejected responses.
        ref_chosen: [B] the same of the chosen responses under the reference model.
        ref_rejected: [B] the same of the rejected responses under the reference model.
        chosen_counts: [B] tokens of the chosen responses; required by ``averaged``, else unused.
        rejected_counts: [B] tokens of the rejected responses; likewise.
        beta: the paper's tau, > 0.
        convention: ``averaged`` over the tokens of a response, or ``summed``.
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Returns:
        LossOutput; the rewards are beta a and beta b (sums) in both conventions.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, an option is out of range, or counts are
            missing.

    Example:
        >>> import torch
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2)]
        >>> out = ipo(*sums, torch.tensor([3]), torch.tensor([2]), beta=0.5)
        >>> round(out.loss.item(), 4)
        0.4669
        >>> round(ipo(*sums, beta=0.5, convention="summed").loss.item(), 4)
        0.09
    """
    check_choice("ipo", "convention", convention, ("averaged", "summed"))
    chosen_B, rejected_B = log_ratios(
        "ipo", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    margin_B = chosen_B - rejected_B
    if convention == "averaged":
        if chosen_counts is None or rejected_counts is None:
            remedy = 'Pass fastpo.sequence_counts(...), or convention="summed".'
            raise fail("ipo", "chosen_counts, rejected_counts", "token counts [B]", "None", remedy)
        chosen_B, rejected_B, chosen_counts_B, rejected_counts_B = prepare(
            "ipo",
            policy_chosen=chosen_B,
            policy_rejected=rejected_B,
            chosen_counts=chosen_counts,
            rejected_counts=rejected_counts,
        )
        chosen_mean_B = mean_logprobs(chosen_B, chosen_counts_B)
        margin_B = chosen_mean_B - mean_logprobs(rejected_B, rejected_counts_B)
    loss_B = (margin_B - 1 / (2 * beta)).square()
    return pair_output(loss_B, beta * chosen_B, beta * rejected_B, reduction)
