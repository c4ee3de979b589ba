"""Policy-gradient surrogates of rewards and advantages.

Log-probs are in nats, summed per response [B] or by token [B, T] with a bool mask. Their gradient
is what matters: where a factor is held fixed, the loss's value is no objective. Advantages,
rewards, references and earlier policies never get a gradient.

Ratios of probabilities are formed from log-ratios held at 20 or below, as in verl, so that they are
finite in float32; a response beyond that gets no gradient from its ratio.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fastpo.bounds import hold
from fastpo.checks import check_tensors
from fastpo.inputs import Trained
from fastpo.losses._common import (
    REDUCTIONS,
    LossOutput,
    Reduction,
    UnpairedOutput,
    check_choice,
    check_flags,
    check_positive,
    fail,
    log_ratios,
    negative_log_likelihood,
    pair_output,
    prepare,
    unpaired_output,
)

LOG_RATIO_MAX = 20.0


def _prepare_rows(loss: str, dims: str, **statistics: Tensor) -> list[Tensor]:
    """:func:`prepare` for two dimensions."""
    first = next(iter(statistics.values()))
    for name, tensor in statistics.items():
        if tensor.ndim != 2 or tensor.shape != first.shape:
            expected = f"[{dims}], the same for {', '.join(statistics)}"
            remedy = "Give one row per response or prompt."
            raise fail(loss, name, expected, f"{list(tensor.shape)}", remedy)
    flat = prepare(loss, **{name: tensor.flatten() for name, tensor in statistics.items()})
    return [tensor.reshape(first.shape) for tensor in flat]


def copg(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Contrastive policy gradient on two responses, at any distribution they were drawn from.

    -[(r_1 - r_2) d - beta / 2 d^2], d = a - b the difference of log-ratios (arXiv:2406.19185; the
    paper prints the quantity to be maximised). Its gradient is the leave-one-out policy gradient of
    two samples with the KL in the reward; it is zero at d = (r_1 - r_2) / beta. Chosen and rejected
    are the first and second response, ordered or not. With r_1 - r_2 = 1/2 it is beta / 2 times IPO
    on sums, minus 1 / (8 beta).

    Args:
        chosen_scores: [B] rewards r_1.
        rejected_scores: [B] rewards r_2.
        beta: weight of the KL, > 0; the paper sweeps 0.01 to 1.

    Other arguments, result and errors are those of :func:`dpo`.

    Example:
        >>> out = copg(*torch.tensor([[-2.5], [-2.7], [-2.7], [-2.2]]), torch.tensor([1.0]),
        ...            torch.tensor([0.4]), beta=0.5)
        >>> round(out.loss.item(), 4)
        -0.2975
    """
    chosen_B, rejected_B = log_ratios(
        "copg", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    chosen_B, rejected_B, chosen_scores_B, rejected_scores_B = prepare(
        "copg",
        policy_chosen=chosen_B,
        policy_rejected=rejected_B,
        chosen_scores=chosen_scores,
        rejected_scores=rejected_scores,
    )
    margin_B = chosen_B - rejected_B
    gap_B = (chosen_scores_B - rejected_scores_B).detach()
    loss_B = (beta / 2 * margin_B - gap_B) * margin_B
    return pair_output(loss_B, beta * chosen_B, beta * rejected_B, reduction)


def copg_groups(
    policy: Trained,
    ref: Tensor,
    scores: Tensor,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """:func:`copg` averaged over all pairs of a group of G responses.

    By centring, the sum over pairs needs no pairs: sum_{i<j} (x_i - x_j)(y_i - y_j) = G sum_i
    (x_i - mean x)(y_i - mean y). A group of one has no pair and gives 0.

    Args:
        policy: [P, G] summed log-probs of each prompt's responses.
        ref: [P, G] the same under the reference.
        scores: [P, G] rewards.
        beta: weight of the KL, > 0.
        reduction: ``mean`` over prompts, ``sum`` or ``none``.

    Returns:
        UnpairedOutput with a loss per prompt [P]; the rewards [P, G] are beta times the log-ratios.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> out = copg_groups(torch.tensor([[-2.5, -2.7]]), torch.tensor([[-2.7, -2.2]]),
        ...                   torch.tensor([[1.0, 0.4]]), beta=0.5)
        >>> round(out.loss.item(), 4)
        -0.2975
    """
    check_tensors("losses.copg_groups", policy=policy, ref=ref, scores=scores)
    check_positive("copg_groups", "beta", beta)
    check_choice("copg_groups", "reduction", reduction, REDUCTIONS)
    policy_PG, ref_PG, scores_PG = _prepare_rows(
        "copg_groups", "P, G", policy=policy, ref=ref, scores=scores
    )
    size = policy_PG.shape[1]
    ratio_PG, scores_PG = policy_PG - ref_PG.detach(), scores_PG.detach()
    centred_PG = ratio_PG - ratio_PG.sum(1, keepdim=True) / max(size, 1)
    gaps_PG = scores_PG - scores_PG.sum(1, keepdim=True) / max(size, 1)
    # G times the centred sum, over G (G - 1) / 2 pairs.
    loss_P = ((beta / 2 * centred_PG - gaps_PG) * centred_PG).sum(1) * (2 / max(size - 1, 1))
    return unpaired_output(loss_P, beta * ratio_PG, reduction)


def nash_md(
    policy: Trained,
    ref: Tensor,
    mask: Tensor,
    win_rates: Tensor,
    beta: float = 0.1,
    credit: Literal["token", "sequence"] = "token",
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """Nash-MD: policy gradient of the preference against a mixture of policy and reference.

    beta sum_t sg(l_t) log p_t - (p - 1/2) sum_t log p_t, l_t = log p_t - log ref_t of the sampled
    tokens, sg stop-gradient, p the probability that the response beats one of the mixture whose
    logits are (1 - c) policy + c reference (arXiv:2312.00886, in the form of TRL's trainer). TRL
    credits a token with its own KL alone; ``sequence`` is the unbiased estimate, beta sg(sum l)
    sum log p, of EGPO's code. With one token they agree.

    Args:
        policy: [B, T] log-probs of the response's tokens, any float dtype, nats.
        ref: [B, T] the same under the reference.
        mask: [B, T] bool, true for tokens of the response.
        win_rates: [B] p, from a judge or as the sigmoid of a difference of rewards.
        beta: weight of the KL, > 0.
        credit: ``token`` or ``sequence``.
        reduction: ``mean`` over responses, ``sum`` or ``none``.

    Returns:
        UnpairedOutput; the rewards are beta sum_t l_t.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> out = nash_md(torch.tensor([[-1.0, -2.0, -0.5]]), torch.tensor([[-1.2, -1.8, -0.4]]),
        ...               torch.ones(1, 3, dtype=torch.bool), torch.tensor([0.6457]))
        >>> round(out.loss.item(), 4)
        0.5349
    """
    check_tensors("losses.nash_md", policy=policy, ref=ref)
    check_positive("nash_md", "beta", beta)
    check_choice("nash_md", "credit", credit, ("token", "sequence"))
    check_choice("nash_md", "reduction", reduction, REDUCTIONS)
    policy_BT, ref_BT = _prepare_rows("nash_md", "B, T", policy=policy, ref=ref)
    check_flags("nash_md", "mask", mask, policy)
    policy_BT, ref_BT = torch.where(mask, policy_BT, 0.0), torch.where(mask, ref_BT, 0.0)
    sum_B = policy_BT.sum(1)
    sum_B, win_rates_B = prepare("nash_md", policy=sum_B, win_rates=win_rates)
    ratio_BT = (policy_BT - ref_BT).detach()
    if credit == "token":
        kl_B = (ratio_BT * policy_BT).sum(1)
    else:
        kl_B = ratio_BT.sum(1) * sum_B
    loss_B = beta * kl_B - (win_rates_B.detach() - 0.5) * sum_B
    return unpaired_output(loss_B, beta * ratio_BT.sum(1), reduction)


def rloo(
    policy: Trained,
    old_policy: Tensor,
    advantages: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """RLOO: clipped ratio of whole responses with leave-one-out advantages.

    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(policy - old_policy) of the response
    (arXiv:2402.14740, in the form of TRL's trainer). In the first epoch r = 1 and the gradient is
    that of -A log p. :func:`fastpo.advantages.rloo` gives A, with the KL in the reward.

    Args:
        policy: [B] summed log-probs of the responses, any float dtype, nats.
        old_policy: [B] the same under the policy that wrote them.
        advantages: [B].
        clip_low: how far a ratio may fall, in [0, 1].
        clip_high: how far it may rise, >= 0.
        reduction: ``mean`` over responses, ``sum`` or ``none``.

    Returns:
        UnpairedOutput; the rewards are the advantages, the metric ``clipped`` is the share of
        responses whose gradient the clip cuts off.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> out = rloo(torch.tensor([-9.9, -8.3]), torch.tensor([-10.0, -8.0]),
        ...            torch.tensor([0.5, -0.5]), reduction="none")
        >>> [round(x, 4) for x in out.loss.tolist()]
        [-0.5526, 0.4]
    """
    check_choice("rloo", "reduction", reduction, REDUCTIONS)
    if not (0 <= clip_low <= 1 and 0 <= clip_high < math.inf):
        got, remedy = f"{clip_low!r} and {clip_high!r}", "0.2 for both is common."
        raise fail("rloo", "clip_low, clip_high", "a share and a number >= 0", got, remedy)
    policy_B, old_policy_B, advantages_B = prepare(
        "rloo", policy=policy, old_policy=old_policy, advantages=advantages
    )
    advantages_B = advantages_B.detach()
    ratio_B = torch.exp(hold(policy_B - old_policy_B.detach(), high=LOG_RATIO_MAX))
    clipped_B = hold(ratio_B, 1 - clip_low, 1 + clip_high)
    loss_B = -torch.minimum(ratio_B * advantages_B, clipped_B * advantages_B)
    cut_B = (ratio_B < 1 - clip_low) & (advantages_B < 0)
    cut_B = cut_B | (ratio_B > 1 + clip_high) & (advantages_B > 0)
    clipped = cut_B.to(loss_B).sum() / max(cut_B.shape[0], 1)
    return unpaired_output(loss_B, advantages_B, reduction, clipped=clipped)


def remax(
    policy: Trained, returns: Tensor, mask: Tensor, reduction: Reduction = "mean"
) -> UnpairedOutput:
    """ReMax: REINFORCE by token, on returns above those of the greedy response.

    -sum_t G_t log p_t / (all tokens of the batch)  (arXiv:2310.10505, the authors' code).
    :func:`fastpo.advantages.remax_returns` gives G. Each response carries its share, so that the
    mean of ``reduction="none"`` is the reduced loss.

    Args:
        policy: [B, T] log-probs of the response's tokens, any float dtype, nats.
        returns: [B, T] G.
        mask: [B, T] bool, true for tokens of the response.
        reduction: ``mean``, ``sum`` or ``none``.

    Returns:
        UnpairedOutput; the rewards are the mean returns of each response.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> out = remax(torch.tensor([[-1.0, -2.0, -0.5]]), torch.tensor([[0.48, 0.52, 0.51]]),
        ...             torch.ones(1, 3, dtype=torch.bool))
        >>> round(out.loss.item(), 4)
        0.5917
    """
    check_tensors("losses.remax", policy=policy, returns=returns)
    check_choice("remax", "reduction", reduction, REDUCTIONS)
    policy_BT, returns_BT = _prepare_rows("remax", "B, T", policy=policy, returns=returns)
    check_flags("remax", "mask", mask, policy)
    policy_BT = torch.where(mask, policy_BT, 0.0)
    returns_BT = torch.where(mask, returns_BT, 0.0).detach()
    counts_B = mask.sum(1).to(policy_BT)
    loss_B = negative_log_likelihood((returns_BT * policy_BT).sum(1), counts_B, "token_mean")
    rewards_B = returns_BT.sum(1) / counts_B.clamp(min=1)
    return unpaired_output(loss_B, rewards_B, reduction)
