"""Losses over pairs of responses, without a reference model.

All take summed log-probs per response, in nats, and token counts; below, m is a mean log-prob per
token (sum / count, 0 for an empty response).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.bounds import hold
from fastpo.inputs import Trained
from fastpo.losses._common import (
    LARGEST_EXPONENT,
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
    log1mexp,
    log_odds,
    mean_logprobs,
    negative_log_likelihood,
    pair_output,
    prepare,
    reduce,
)
from fastpo.losses.margins import soft_logistic

# Below it alpha m^2 / 2 is lost in the rounding of m, and alpha m nears the denormals.
SMALL_ALPHA = 1e-20


def _mean_pair(
    loss: str,
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    chosen_counts: Tensor,
    rejected_counts: Tensor,
    reduction: Reduction,
) -> tuple[Tensor, Tensor]:
    """Checks of the losses that need nothing but mean log-probs; then these, [B] each."""
    check_choice(loss, "reduction", reduction, REDUCTIONS)
    chosen_B, rejected_B, chosen_counts_B, rejected_counts_B = prepare(
        loss,
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        chosen_counts=chosen_counts,
        rejected_counts=rejected_counts,
    )
    return mean_logprobs(chosen_B, chosen_counts_B), mean_logprobs(rejected_B, rejected_counts_B)


def simpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    chosen_counts: Tensor,
    rejected_counts: Tensor,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> LossOutput:
    """SimPO: logistic loss on the difference of mean log-probs, with a target margin.

    z = beta (m_chosen - m_rejected) - gamma;  -logsigmoid(z)  (arXiv:2405.14734, eq. 6). With label
    smoothing e: -(1 - e) logsigmoid(z) - e logsigmoid(-z), as in the authors' code.

    Args:
        policy_chosen: [B] summed log-probs of the chosen responses, any float dtype, nats.
        policy_rejected: [B] the same of the rejected responses.
        chosen_counts: [B] tokens of the chosen responses.
        rejected_counts: [B] tokens of the rejected responses.
        beta: scale of the mean log-probs, > 0.
        gamma: target margin, on the scale of the rewards; positive in the paper.
        label_smoothing: e, assumed share of flipped labels, in [0, 0.5).
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Returns:
        LossOutput; the rewards are beta m.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> import torch
        >>> sums, counts = torch.tensor([[-2.5], [-2.7]]), torch.tensor([[3], [2]])
        >>> out = simpo(*sums, *counts)
        >>> round(out.loss.item(), 4)
        0.4616
    """
    check_positive("simpo", "beta", beta)
    check_finite("simpo", "gamma", gamma)
    check_label_smoothing("simpo", label_smoothing)
    chosen_B, rejected_B = _mean_pair(
        "simpo", policy_chosen, policy_rejected, chosen_counts, rejected_counts, reduction
    )
    chosen_rewards_B, rejected_rewards_B = beta * chosen_B, beta * rejected_B
    loss_B = soft_logistic(chosen_rewards_B - rejected_rewards_B - gamma, 1 - label_smoothing)
    return pair_output(loss_B, chosen_rewards_B, rejected_rewards_B, reduction)


def orpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    chosen_counts: Tensor,
    rejected_counts: Tensor,
    beta: float = 0.1,
    nll_mean: NllMean = "token_mean",
    nll_sums: Trained | None = None,
    nll_counts: Tensor | None = None,
    reduction: Reduction = "mean",
) -> LossOutput:
    """ORPO: likelihood of the chosen response plus a logistic loss on the difference of log-odds.

    NLL - beta logsigmoid(lo(m_chosen) - lo(m_rejected)),  lo(m) = m - log(1 - exp m)
    (arXiv:2403.07691, eq. 6 and 7; the paper's lambda is beta here, as in TRL). The log-odds stay
    finite at p = 1: 1 - p is held at the machine epsilon or above.

    The NLL is averaged over all tokens of the batch (``token_mean``), or over the tokens of a
    sequence and then over sequences (``sequence_mean``, the paper). With ``token_mean`` each pair
    carries its share, so that the mean of ``reduction="none"`` is the reduced loss. TRL's ORPO
    trainer takes the NLL over prompt and response: give it those by ``nll_sums``, ``nll_counts``.

    Args:
        policy_chosen: [B] summed log-probs of the chosen responses, any float dtype, nats.
        policy_rejected: [B] the same of the rejected responses.
        chosen_counts: [B] tokens of the chosen responses.
        rejected_counts: [B] tokens of the rejected responses.
        beta: weight of the odds-ratio term, >= 0.
        nll_mean: ``token_mean`` or ``sequence_mean``.
        nll_sums: [B] summed log-probs the NLL is taken over; ``policy_chosen`` if not given.
        nll_counts: [B] tokens of ``nll_sums``; both or neither.
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Returns:
        LossOutput; the rewards are beta m, as TRL reports them.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> import torch
        >>> sums, counts = torch.tensor([[-2.5], [-2.7]]), torch.tensor([[3], [2]])
        >>> out = orpo(*sums, *counts)
        >>> round(out.loss.item(), 4)
        0.8709
    """
    check_not_negative("orpo", "beta", beta)
    check_choice("orpo", "nll_mean", nll_mean, NLL_MEANS)
    check_choice("orpo", "reduction", reduction, REDUCTIONS)
    if (nll_sums is None) != (nll_counts is None):
        remedy = "Pass the other one as well."
        raise fail("orpo", "nll_sums, nll_counts", "both or neither", "one of them", remedy)
    chosen_B, rejected_B, chosen_counts_B, rejected_counts_B, nll_sums_B, nll_counts_B = prepare(
        "orpo",
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        chosen_counts=chosen_counts,
        rejected_counts=rejected_counts,
        nll_sums=policy_chosen if nll_sums is None else nll_sums,
        nll_counts=chosen_counts if nll_counts is None else nll_counts,
    )
    chosen_mean_B = mean_logprobs(chosen_B, chosen_counts_B)
    rejected_mean_B = mean_logprobs(rejected_B, rejected_counts_B)
    odds_B = soft_logistic(log_odds(chosen_mean_B) - log_odds(rejected_mean_B))
    nll_B = negative_log_likelihood(nll_sums_B, nll_counts_B, nll_mean)
    rewards = beta * chosen_mean_B, beta * rejected_mean_B
    return pair_output(nll_B + beta * odds_B, *rewards, reduction, nll=reduce(nll_B, "mean"))


def alphapo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    chosen_counts: Tensor,
    rejected_counts: Tensor,
    alpha: float = 0.25,
    beta: float = 2.5,
    gamma: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """AlphaPO: SimPO with a reward that bends with the likelihood.

    r = (1 - exp(-alpha m)) / alpha;  -logsigmoid(beta (r_chosen - r_rejected) - gamma)
    (arXiv:2501.03884). alpha = 0 is SimPO; the reward is taken by expm1 and goes over to m without
    noise. TRL's CPO trainer bends whichever log-prob its form uses, sums as well, where the
    exponential overflows; here it is the mean alone. Exponents are held at 80 (700 in
    float64): a mean log-prob below -80 / alpha gets no gradient.

    Args:
        policy_chosen: [B] summed log-probs of the chosen responses, nats.
        policy_rejected: [B] the same of the rejected responses.
        chosen_counts: [B] tokens of the chosen responses.
        rejected_counts: [B] tokens of the rejected responses.
        alpha: bend of the reward; > 0 pushes unlikely responses harder, 0 is SimPO.
        beta: scale of the rewards, > 0.
        gamma: target margin, on the scale of beta r.
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Result and errors are those of :func:`simpo`; the rewards are beta r.

    Example:
        >>> sums, counts = torch.tensor([[-2.5], [-2.7]]), torch.tensor([[3], [2]])
        >>> round(alphapo(*sums, *counts).loss.item(), 4)
        0.1842
    """
    check_finite("alphapo", "alpha", alpha)
    check_finite("alphapo", "gamma", gamma)
    check_positive("alphapo", "beta", beta)
    means = _mean_pair(
        "alphapo", policy_chosen, policy_rejected, chosen_counts, rejected_counts, reduction
    )
    rewards = means
    if abs(alpha) > SMALL_ALPHA:
        largest = LARGEST_EXPONENT[means[0].dtype]
        rewards = [-torch.expm1(hold(-alpha * m_B, high=largest)) / alpha for m_B in means]
    chosen_B, rejected_B = (beta * reward_B for reward_B in rewards)
    loss_B = soft_logistic(chosen_B - rejected_B - gamma)
    return pair_output(loss_B, chosen_B, rejected_B, reduction)


def asft(
    policy_chosen: Trained,
    policy_rejected: Trained,
    chosen_counts: Tensor,
    rejected_counts: Tensor,
    beta: float = 1.0,
    reduction: Reduction = "mean",
) -> LossOutput:
    """ASFT, aligned supervised fine-tuning: likelihood of the chosen, unlikelihood of the rejected.

    NLL + beta [-logsigmoid(lo(m_chosen)) - logsigmoid(-lo(m_rejected))], lo(m) = m - log(1 - exp m)
    (arXiv:2409.10571, ORPO's identity with the NLL), with the NLL averaged over the tokens of a
    sequence. By logsigmoid(lo(m)) = m it is -(1 + beta) m_chosen - beta log(1 - exp m_rejected),
    the form computed. The unlikelihood stays finite at p = 1. It is not the Anchored SFT that
    LLaMA-Factory calls ASFT.

    Args:
        policy_chosen: [B] summed log-probs of the chosen responses, nats.
        policy_rejected: [B] the same of the rejected responses.
        chosen_counts: [B] tokens of the chosen responses.
        rejected_counts: [B] tokens of the rejected responses.
        beta: the paper's lambda, weight of the alignment terms, >= 0; 1 is the best of its 0.1,
            0.2, 0.5 and 1.
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Result and errors are those of :func:`simpo`; the rewards are beta m.

    Example:
        >>> sums, counts = torch.tensor([[-2.5], [-2.7]]), torch.tensor([[3], [2]])
        >>> round(asft(*sums, *counts).loss.item(), 4)
        1.9667
    """
    check_not_negative("asft", "beta", beta)
    chosen_B, rejected_B = _mean_pair(
        "asft", policy_chosen, policy_rejected, chosen_counts, rejected_counts, reduction
    )
    loss_B = -(1 + beta) * chosen_B - beta * log1mexp(rejected_B)
    return pair_output(loss_B, beta * chosen_B, beta * rejected_B, reduction)
