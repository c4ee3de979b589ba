"""DPO with a margin that other models or the reference set.

Inputs, a, b and d are those of :mod:`fastpo.losses.pairwise`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from fastpo.bounds import hold
from fastpo.inputs import Trained
from fastpo.losses._common import (
    LARGEST_EXPONENT,
    LossOutput,
    Reduction,
    check_choice,
    check_finite,
    check_not_negative,
    check_positive,
    fail,
    log_ratios,
    mean_logprobs,
    pair_output,
    prepare,
    reduce,
)
from fastpo.losses.margins import soft_logistic

Form = Literal["easy", "clip", "soft_floor", "paper"]

FORMS = ("easy", "clip", "soft_floor", "paper")


def modpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_margins: Sequence[Tensor],
    rejected_margins: Sequence[Tensor],
    weights: Sequence[float],
    beta: float = 0.1,
    link: Literal["sigmoid", "hinge"] = "sigmoid",
    reduction: Reduction = "mean",
) -> LossOutput:
    """MODPO: DPO for one objective, with a margin from the rewards of the others.

    With M the margin rewards and w = (w_0, w'), z = (beta a - M_chosen . w') / w_0 - (beta b -
    M_rejected . w') / w_0; -logsigmoid(z), or max(0, 1 - z)  (arXiv:2310.03708, and the authors'
    code). The rewards are the two terms of z. Other arguments and errors are those of :func:`dpo`.

    Args:
        chosen_margins: for each further objective [B] rewards of the chosen responses, without
            gradient. They may be the implicit rewards of other DPO models.
        rejected_margins: the same of the rejected responses.
        weights: w_0 > 0 of the objective of these pairs, then those of the others in their order;
            they sum to 1 in the paper.
        link: ``sigmoid`` or ``hinge``.

    Example:
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2)]
        >>> margins = [torch.tensor([0.3])], [torch.tensor([0.1])]
        >>> round(modpo(*sums, *margins, weights=(0.6, 0.4), beta=0.5).loss.item(), 4)
        0.4932
    """
    check_choice("modpo", "link", link, ("sigmoid", "hinge"))
    if not len(weights) == len(chosen_margins) + 1 == len(rejected_margins) + 1:
        got = f"{len(weights)}, for {len(chosen_margins)} and {len(rejected_margins)} margins"
        remedy = "Give w_0 first, then one weight for each margin reward."
        raise fail("modpo", "weights", "one more than margins on each side", got, remedy)
    check_positive("modpo", "weights[0]", weights[0])
    for i, weight in enumerate(weights):
        check_finite("modpo", f"weights[{i}]", weight)
    chosen_B, rejected_B = log_ratios(
        "modpo", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    margins = {f"chosen_margins[{i}]": m for i, m in enumerate(chosen_margins)}
    margins |= {f"rejected_margins[{i}]": m for i, m in enumerate(rejected_margins)}
    chosen_B, rejected_B, *margins_B = prepare(
        "modpo", policy_chosen=chosen_B, policy_rejected=rejected_B, **margins
    )
    chosen_rewards_B, rejected_rewards_B = beta * chosen_B, beta * rejected_B
    others = len(chosen_margins)
    for i, weight in enumerate(weights[1:]):
        chosen_rewards_B = chosen_rewards_B - weight * margins_B[i].detach()
        rejected_rewards_B = rejected_rewards_B - weight * margins_B[others + i].detach()
    rewards = chosen_rewards_B / weights[0], rejected_rewards_B / weights[0]
    z_B = rewards[0] - rewards[1]
    loss_B = soft_logistic(z_B) if link == "sigmoid" else relu(1 - z_B)
    return pair_output(loss_B, *rewards, reduction)


def _reciprocal(mean_B: Tensor, form: str, margin_of: str) -> Tensor:
    """1 / exp(m) of mean log-probs m <= 0, or 1 / m; finite at m = 0 and at any m below."""
    if form == "paper" or margin_of == "prob":
        return torch.exp(hold(-mean_B, high=LARGEST_EXPONENT[mean_B.dtype]))
    return 1 / hold(mean_B, high=-torch.finfo(mean_B.dtype).eps)


def cpo_constrained(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_counts: Tensor,
    rejected_counts: Tensor,
    beta: float = 2.5,
    gamma: float = 0.05,
    form: Form = "easy",
    margin_of: Literal["mean_logp", "prob"] = "mean_logp",
    tau: float = 2.0,
    alpha: float = 1.0,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Constrained preference optimisation: a margin against pairs that improve and stay wrong.

    (arXiv:2605.20834 and the authors' code; contrastive preference optimisation is :func:`cpo`.)
    With r = R / n the reference's log-probs per token, g = r_chosen - r_rejected and
    u = a / n_chosen - b / n_rejected, the loss is -logsigmoid of

    - ``easy``: beta u - gamma (1 / r_chosen + 1 / r_rejected), as the code has it: that bracket is
      negative and relieves the pair. With ``margin_of="prob"`` it is the paper's, below.
    - ``clip``: beta (u + min(g, 0)), without gamma.
    - ``soft_floor``: beta u - (beta / alpha) softplus(tau (gamma - g)) / tau, in the code with beta
      0.1 and gamma 0.5.
    - ``paper``: beta d - gamma (1 / p_chosen + 1 / p_rejected) with p = exp(r), eq. 17.

    The metric ``undesirable`` is the share of pairs with u > 0 > u + g (eq. 14): better than the
    reference, still in the wrong order. The code's sum with the likelihood of the chosen response
    is a :func:`mixture`. The rewards are beta a / n and beta b / n, with ``paper`` beta a and
    beta b. Other arguments and errors are those of :func:`dpo`.

    Args:
        chosen_counts: [B] tokens of the chosen responses.
        rejected_counts: [B] tokens of the rejected responses.
        gamma: size of the margin, >= 0.
        form: which loss.
        margin_of: under the fractions of ``easy``, log-probs per token or their exponentials.
        tau: sharpness of the soft floor, > 0.
        alpha: divides the soft floor, > 0.

    Example:
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2)]
        >>> counts = torch.tensor([3]), torch.tensor([2])
        >>> round(cpo_constrained(*sums, *counts, beta=0.5, gamma=0.02).loss.item(), 4)
        0.5987

    Experimental: ``paper`` and ``margin_of="prob"`` were read in reproductions, which agree.
    """
    check_not_negative("cpo_constrained", "gamma", gamma)
    check_choice("cpo_constrained", "form", form, FORMS)
    check_choice("cpo_constrained", "margin_of", margin_of, ("mean_logp", "prob"))
    check_positive("cpo_constrained", "tau", tau)
    check_positive("cpo_constrained", "alpha", alpha)
    sums = policy_chosen, policy_rejected, ref_chosen, ref_rejected
    chosen_B, rejected_B = log_ratios("cpo_constrained", *sums, beta, reduction)
    chosen_B, rejected_B, *rest_B = prepare(
        "cpo_constrained",
        policy_chosen=chosen_B,
        policy_rejected=rejected_B,
        ref_chosen=ref_chosen.detach(),
        ref_rejected=ref_rejected.detach(),
        chosen_counts=chosen_counts,
        rejected_counts=rejected_counts,
    )
    refs_B, counts_B = rest_B[:2], rest_B[2:]
    refs_B = [mean_logprobs(x_B, n_B) for x_B, n_B in zip(refs_B, counts_B, strict=True)]
    gap_B = refs_B[0] - refs_B[1]
    means_B = mean_logprobs(chosen_B, counts_B[0]), mean_logprobs(rejected_B, counts_B[1])
    gain_B = means_B[0] - means_B[1]
    is_undesirable_B = (gain_B > 0) & (gain_B + gap_B < 0)
    chosen_B, rejected_B = (
        beta * x_B for x_B in ((chosen_B, rejected_B) if form == "paper" else means_B)
    )
    if form == "clip":
        offset_B = beta * relu(-gap_B)
    elif form == "soft_floor":
        offset_B = -beta / (alpha * tau) * logsigmoid(tau * (gap_B - gamma))  # a softplus
    else:
        offset_B = gamma * sum(_reciprocal(x_B, form, margin_of) for x_B in refs_B)
    loss_B = soft_logistic(chosen_B - rejected_B - offset_B)
    rate = reduce(is_undesirable_B.to(loss_B), "mean")
    return pair_output(loss_B, chosen_B, rejected_B, reduction, undesirable=rate)
