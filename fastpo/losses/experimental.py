"""Losses whose published form could not be read: a stated rule each, not a reproduction."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from fastpo.bounds import hold
from fastpo.inputs import Over, Trained
from fastpo.losses._common import (
    REDUCTIONS,
    LossOutput,
    Reduction,
    UnpairedOutput,
    check_choice,
    check_positive,
    log_ratios,
    pair_output,
    prepare,
    unpaired_output,
)
from fastpo.losses._lists import prepare_lists
from fastpo.losses.margins import soft_logistic

_OTHER_PROMPT = Over("the chosen response under a prompt that it does not fit")
# Below it Hellinger and JS go on along their tangent: both have a pole further down.
LOWEST = -0.5


def _hellinger(x_B: Tensor) -> Tensor:
    return x_B / (1 + x_B)


def _js(x_B: Tensor) -> Tensor:
    return torch.log(2 - torch.exp(-x_B))


# Each with its slope at ``LOWEST``.
WITH_POLE = {
    "hellinger": (_hellinger, (1 + LOWEST) ** -2),
    "js": (_js, 1 / (2 * math.exp(LOWEST) - 1)),
}


def sft_fdiv(
    policy_chosen: Trained,
    ref_chosen: Tensor,
    beta: float = 0.1,
    divergence: Literal["chi2", "hellinger", "js"] = "chi2",
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """Supervised fine-tuning as reward learning: a concave function of the implicit reward.

    -phi(x), x = beta (policy - ref) of chosen responses alone; phi is x - x^2 / 4 (``chi2``),
    x / (1 + x) (``hellinger``) or log(2 - exp(-x)) (``js``)  (arXiv:2507.00018). phi(x) = x is the
    likelihood. The last two have a pole below 0 and go on along their tangent from x = -1/2 down.

    Args:
        policy_chosen: [B] summed log-probs of the responses, nats.
        ref_chosen: [B] the same under the reference model.
        beta: scale of the rewards, > 0.
        divergence: ``chi2``, ``hellinger`` or ``js``.
        reduction: ``mean`` over responses, ``sum`` or ``none``.

    Returns:
        UnpairedOutput; the rewards are x.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Experimental: the functions are those of the family (inverse soft Q-learning), from memory; the
    paper's own objectives were not read.

    Example:
        >>> out = sft_fdiv(torch.tensor([-2.5]), torch.tensor([-2.7]), beta=0.5)
        >>> round(out.loss.item(), 4)
        -0.0975
    """
    check_positive("sft_fdiv", "beta", beta)
    check_choice("sft_fdiv", "divergence", divergence, ("chi2", *WITH_POLE))
    check_choice("sft_fdiv", "reduction", reduction, REDUCTIONS)
    policy_B, ref_B = prepare("sft_fdiv", policy_chosen=policy_chosen, ref_chosen=ref_chosen)
    reward_B = beta * (policy_B - ref_B.detach())
    if divergence == "chi2":
        return unpaired_output(reward_B**2 / 4 - reward_B, reward_B, reduction)
    concave, slope = WITH_POLE[divergence]
    inside_B = hold(reward_B, low=LOWEST)
    value_B = concave(inside_B) + slope * (reward_B - inside_B)
    return unpaired_output(-value_B, reward_B, reduction)


def mapl(
    policy_chosen: Trained,
    policy_rejected: Annotated[Trained, _OTHER_PROMPT],
    ref_chosen: Tensor,
    ref_rejected: Annotated[Tensor, _OTHER_PROMPT],
    other_margins: Trained | None = None,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Multi-level aware preference learning, MAPL, on re-paired responses.

    -logsigmoid(beta d), d the log-ratio of one response under a prompt that it fits (chosen) minus
    under one that it does not (rejected); with the margins d' of other pairs, which should be the
    smaller ones, -logsigmoid(beta (d - d'))  (arXiv:2505.12845).

    Args:
        policy_chosen: [B] summed log-probs of the responses under the prompts that fit, nats.
        policy_rejected: [B] the same under the prompts that do not fit.
        ref_chosen: [B] as ``policy_chosen``, under the reference model.
        ref_rejected: [B] as ``policy_rejected``, under the reference model.
        other_margins: [B] d' of the pairs to compare with, with gradient; 0 if not given.
        beta: strength of the tie to the reference, > 0.
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Result and errors are those of :func:`dpo`.

    Experimental: the objective inside a sample and the rules of the pairs were read in a note on
    the paper; that of other margins was not.

    Example:
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2)]
        >>> round(mapl(*sums, other_margins=torch.tensor([0.7]), beta=0.5).loss.item(), 4)
        0.6931
    """
    chosen_B, rejected_B = log_ratios(
        "mapl", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    margin_B = chosen_B - rejected_B
    if other_margins is not None:
        margin_B, other_B = prepare("mapl", policy_chosen=margin_B, other_margins=other_margins)
        margin_B = margin_B - other_B
    return pair_output(
        soft_logistic(beta * margin_B), beta * chosen_B, beta * rejected_B, reduction
    )


def tpo_tree(
    policy: Trained,
    ref: Tensor,
    scores: Tensor,
    mask: Tensor | None = None,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """Tree preference optimisation: pairs of a ranked list, weighed by what their order is worth.

    sum over pairs with v_i > v_j of |G_i - G_j| |1 / log(1 + k_i) - 1 / log(1 + k_j)|
    softplus(g_j - g_i), with g = beta (policy - ref), G = 2^v - 1 and k the rank of g in its list,
    from 1, without gradient  (arXiv:2410.12854, in the LambdaLoss form of arXiv:2402.01878). For
    step weights give sums of weighted step log-probs; the authors weigh a step by 1 + its cosine
    similarity to the best response's.

    Args:
        policy: [B, K] summed log-probs, in any order, nats.
        ref: [B, K] the same under the reference model.
        scores: [B, K] values v, about [0, 1]; no gradient. Equal values make no pair.
        mask: [B, K] bool, True where there is a response; all of them if not given.
        beta: strength of the tie to the reference, > 0.
        reduction: ``mean`` over prompts, ``sum`` or ``none``.

    Returns:
        UnpairedOutput; the rewards [B, K] are g.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Experimental: the equations were not read. The released code is another thing, its list loss
    inside -log sigmoid with labels evenly spaced by position, and contradicts the abstract.

    Example:
        >>> out = tpo_tree(torch.tensor([[0.4, 0.1, -0.3, 0.2]]), torch.zeros(1, 4),
        ...                torch.tensor([[1.0, 0.6, 0.0, 0.3]]), beta=1.0)
        >>> round(out.loss.item(), 4)
        0.8678
    """
    check_positive("tpo_tree", "beta", beta)
    check_choice("tpo_tree", "reduction", reduction, REDUCTIONS)
    policy_BK, ref_BK, scores_BK, mask_BK = prepare_lists(
        "tpo_tree", mask, policy=policy, ref=ref, scores=scores
    )
    scores_BK = scores_BK.detach()
    rewards_BK = beta * (policy_BK - ref_BK.detach())
    falling_BK = rewards_BK.detach().masked_fill(~mask_BK, -torch.inf)
    order_BK = falling_BK.argsort(dim=1, descending=True, stable=True)
    discount_BK = 1 / torch.log(2 + order_BK.argsort(1).to(rewards_BK))
    gains_BK = torch.exp2(scores_BK)
    weight_BKK = (gains_BK[:, :, None] - gains_BK[:, None, :]).abs()
    weight_BKK = weight_BKK * (discount_BK[:, :, None] - discount_BK[:, None, :]).abs()
    pair_BKK = scores_BK[:, :, None] > scores_BK[:, None, :]
    pair_BKK = pair_BKK & mask_BK[:, :, None] & mask_BK[:, None, :]
    terms_BKK = weight_BKK * soft_logistic(rewards_BK[:, :, None] - rewards_BK[:, None, :])
    loss_B = torch.where(pair_BKK, terms_BKK, 0).sum((1, 2))
    return unpaired_output(loss_B, rewards_BK, reduction)
