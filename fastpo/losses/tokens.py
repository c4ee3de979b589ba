"""Losses over pairs that look into the tokens: full-vocabulary divergences and token weights.

They take sums [B], so that the reductions run in the segment kernels. With token log-probs, KLs and
masks [B, T] (or packed):

    policy_chosen = fastpo.sequence_sums(logprobs, mask, weights=weights)
    log_ratio_chosen = fastpo.sequence_log_ratios(logprobs, ref_logprobs, mask, weights=weights)
    kl_chosen = fastpo.sequence_sums(kl, mask)

where ``kl = fastpo.linear_divergence(hidden, head, ref_hidden, ref_head, kind="forward_kl")`` is
KL(reference || policy) over the vocabulary. It has a gradient to the policy. LD-DPO, SamPO and
Step-DPO are :func:`dpo` of such sums with the weights and masks of ``fastpo.weights``.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpo.inputs import Over, Trained
from fastpo.losses._common import (
    REDUCTIONS,
    LossOutput,
    Reduction,
    check_choice,
    check_finite,
    check_not_negative,
    check_positive,
    fail,
    log_ratios,
    pair_output,
    prepare,
    reduce,
)

_PHRASES = Over("the phrases that differ, of fastpo.weights.phrase_masks")
Phrases = Annotated[Trained, _PHRASES]
RefPhrases = Annotated[Tensor, _PHRASES]


def tdpo1(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    kl_chosen: Trained,
    kl_rejected: Trained,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Token-level DPO, first form: DPO with the difference of the sequential KLs as a margin.

    -logsigmoid(beta (d - (K_rejected - K_chosen))), K = sum_t KL(reference || policy)_t
    (arXiv:2404.11999, the authors' code). Both KLs carry a gradient.

    Args:
        kl_chosen: [B] summed KL(reference || policy) of the chosen responses, nats.
        kl_rejected: [B] of the rejected ones.

    The rewards are beta (a + K_chosen) and beta (b + K_rejected). Other arguments, result and
    errors are those of :func:`dpo`.

    Example:
        >>> import torch
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2, 0.3, 0.1)]
        >>> round(tdpo1(*sums, beta=0.5).loss.item(), 4)
        0.4932
    """
    chosen_B, rejected_B = log_ratios(
        "tdpo1", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    names = dict(chosen=chosen_B, rejected=rejected_B, kl_chosen=kl_chosen, kl_rejected=kl_rejected)
    chosen_B, rejected_B, kl_chosen_B, kl_rejected_B = prepare("tdpo1", **names)
    rewards = beta * (chosen_B + kl_chosen_B), beta * (rejected_B + kl_rejected_B)
    return pair_output(-logsigmoid(rewards[0] - rewards[1]), *rewards, reduction)


def tdpo2(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    kl_chosen: Tensor,
    kl_rejected: Trained,
    alpha: float = 0.5,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Token-level DPO, second form: the KL of the chosen responses is a constant.

    -logsigmoid(beta (d - alpha (K_rejected - [K_chosen]))), K = sum_t KL(reference || policy)_t and
    [.] without gradient  (arXiv:2404.11999, the authors' code). alpha = 0 is DPO.

    Args:
        kl_chosen: [B] summed KL(reference || policy) of the chosen responses, nats; it gets no
            gradient.
        kl_rejected: [B] of the rejected ones.
        alpha: weight of the KLs, >= 0.

    The rewards are beta (a + K_chosen) and beta (b + K_rejected). Other arguments, result and
    errors are those of :func:`dpo`.

    Example:
        >>> import torch
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2, 0.3, 0.1)]
        >>> round(tdpo2(*sums, beta=0.5).loss.item(), 4)
        0.513
    """
    check_not_negative("tdpo2", "alpha", alpha)
    chosen_B, rejected_B = log_ratios(
        "tdpo2", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    names = dict(chosen=chosen_B, rejected=rejected_B, kl_chosen=kl_chosen, kl_rejected=kl_rejected)
    chosen_B, rejected_B, kl_chosen_B, kl_rejected_B = prepare("tdpo2", **names)
    gap_B = kl_rejected_B - kl_chosen_B.detach()
    loss_B = -logsigmoid(beta * (chosen_B - rejected_B - alpha * gap_B))
    rewards = beta * (chosen_B + kl_chosen_B), beta * (rejected_B + kl_rejected_B)
    return pair_output(loss_B, *rewards, reduction)


def sparse_po(
    log_ratio_chosen: Trained,
    log_ratio_rejected: Trained,
    kl_chosen: Trained,
    kl_rejected: Trained,
    mask_l1: Trained | None = None,
    kl_mask_l1: Trained | None = None,
    l1: float = 0.0,
    kl_l1: float = 0.0,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """SparsePO: token-level DPO whose log-ratios and KLs are weighted token by token.

    -logsigmoid(beta [(u_chosen - u_rejected) + (D_chosen - D_rejected)]) + l1 |m|_1 + kl_l1 |n|_1
    with u = sum_t m_t (log-ratio)_t, D = sum_t n_t KL(reference || policy)_t and weights m, n >= 0
    (arXiv:2410.05102, the authors' code). Weights of :class:`fastpo.weights.SparseMask` are learned
    along: the gradient reaches them through the weighted sums. Weights of
    :func:`fastpo.weights.ma_po_weights` make it MaPO. All weights 1: :func:`tdpo1`.

    Args:
        log_ratio_chosen: [B] u, ``fastpo.sequence_log_ratios(policy, ref, mask, weights=m)``. The
            difference per token comes first: weights see the log-ratio, and the reference's sum
            could not be a constant.
        log_ratio_rejected: [B] of the rejected responses.
        kl_chosen: [B] D, ``fastpo.sequence_sums(kl, mask, weights=n)``.
        kl_rejected: [B] of the rejected responses.
        mask_l1: [B] sum of the weights m over both responses; required by ``l1`` > 0.
        kl_mask_l1: [B] the same of n; required by ``kl_l1`` > 0.
        l1: penalty on m, >= 0; the paper has 0.001 in one setting.
        kl_l1: penalty on n, >= 0.
        beta: 0.1 or 0.8 in the paper.
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    The rewards are beta (u + D). Result and errors are those of :func:`dpo`.

    Example:
        >>> import torch
        >>> out = sparse_po(*(torch.tensor([x]) for x in (0.2, -0.5, 0.3, 0.1)), beta=0.5)
        >>> round(out.loss.item(), 4)
        0.4932
    """
    check_positive("sparse_po", "beta", beta)
    check_choice("sparse_po", "reduction", reduction, REDUCTIONS)
    sums = {
        "log_ratio_chosen": log_ratio_chosen,
        "log_ratio_rejected": log_ratio_rejected,
        "kl_chosen": kl_chosen,
        "kl_rejected": kl_rejected,
    }
    penalties = (("mask_l1", mask_l1, "l1", l1), ("kl_mask_l1", kl_mask_l1, "kl_l1", kl_l1))
    for name, total, option, weight in penalties:
        check_not_negative("sparse_po", option, weight)
        if weight and total is None:
            remedy = f"Pass the summed weights, or {option}=0."
            raise fail("sparse_po", name, "sums of weights [B]", "None", remedy)
        if weight:
            sums[name] = total
    chosen_B, rejected_B, kl_chosen_B, kl_rejected_B, *totals = prepare("sparse_po", **sums)
    rewards = beta * (chosen_B + kl_chosen_B), beta * (rejected_B + kl_rejected_B)
    loss_B = -logsigmoid(rewards[0] - rewards[1])
    for weight, total_B in zip((w for *_, w in penalties if w), totals, strict=True):
        loss_B = loss_B + weight * total_B
    return pair_output(loss_B, *rewards, reduction)


def rrpo(
    policy_chosen: Phrases,
    policy_rejected: Phrases,
    ref_chosen: RefPhrases,
    ref_rejected: RefPhrases,
    kl_chosen: Trained,
    alpha: float = 0.01,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Refined regularised PO: DPO on the phrases that differ, and a KL on the chosen response.

    -logsigmoid(beta d) + alpha K_chosen  (arXiv:2504.12083, the authors' code). The log-probs are
    summed over :func:`fastpo.weights.phrase_masks`, the KL(reference || policy) over all tokens of
    the chosen response; both carry a gradient. A pair without phrases is log 2 plus its KL.

    Args:
        policy_chosen: [B] log-probs summed over the phrases, nats; likewise the next three.
        kl_chosen: [B] summed KL(reference || policy) of the whole chosen responses.
        alpha: weight of the KL, >= 0; 0.01 to 0.1 in the paper.
        beta: 0.1 to 0.9 in the paper.

    Other arguments, result and errors are those of :func:`dpo`; the metric ``kl`` is the mean.

    Example:
        >>> import torch
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2, 0.3)]
        >>> round(rrpo(*sums, alpha=0.1, beta=0.5).loss.item(), 4)
        0.5634
    """
    check_not_negative("rrpo", "alpha", alpha)
    chosen_B, rejected_B = log_ratios(
        "rrpo", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    names = dict(chosen=chosen_B, rejected=rejected_B, kl_chosen=kl_chosen)
    chosen_B, rejected_B, kl_B = prepare("rrpo", **names)
    loss_B = -logsigmoid(beta * (chosen_B - rejected_B)) + alpha * kl_B
    rewards = beta * chosen_B, beta * rejected_B
    return pair_output(loss_B, *rewards, reduction, kl=reduce(kl_B, "mean"))


def tgdpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    guided_chosen: Trained,
    guided_rejected: Trained,
    alpha: float = 0.5,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Token-guided DPO: tokens that a trained model prefers get a larger share of the margin.

    -logsigmoid(beta [sum_t (1 + alpha beta q_t) u_t - sum_t (1 - alpha beta q_t) u_t]), first over
    the chosen and then over the rejected tokens, u_t the log-ratio of the policy and q_t that of a
    frozen model which was trained on preferences  (arXiv:2506.14574, the authors' code). Split into
    the plain sums a, b and the guided sums g = sum_t q_t u_t it is
    -logsigmoid(beta [d + alpha beta (g_chosen + g_rejected)]). alpha = 0 is DPO.

    Args:
        guided_chosen: [B] g, ``fastpo.sequence_log_ratios(policy, ref, mask, weights=q)`` of the
            chosen responses.
        guided_rejected: [B] of the rejected ones.
        alpha: strength of the guidance.

    The rewards are those of the weighted sums. Other arguments, result and errors are those of
    :func:`dpo`.

    Example:
        >>> import torch
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2, 0.1, 0.2)]
        >>> round(tgdpo(*sums, beta=0.5).loss.item(), 4)
        0.5181
    """
    check_finite("tgdpo", "alpha", alpha)
    chosen_B, rejected_B = log_ratios(
        "tgdpo", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    names = dict(guided_chosen=guided_chosen, guided_rejected=guided_rejected)
    chosen_B, rejected_B, guided_chosen_B, guided_rejected_B = prepare(
        "tgdpo", chosen=chosen_B, rejected=rejected_B, **names
    )
    scale = alpha * beta
    chosen_rewards_B = beta * (chosen_B + scale * guided_chosen_B)
    rejected_rewards_B = beta * (rejected_B - scale * guided_rejected_B)
    loss_B = -logsigmoid(chosen_rewards_B - rejected_rewards_B)
    return pair_output(loss_B, chosen_rewards_B, rejected_rewards_B, reduction)
