"""Weights [B] of whole responses and pairs. They are constants: none carries a gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpo.checks import check_tensors
from fastpo.weights._common import accumulation, check_like, check_masks, fail

_EPS = 1e-10  # inside UPO's logarithms, as in the authors' code


def madpo_weights(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    c_max: float = 2.0,
    c_min: float | None = None,
    steepness: float = 1.0,
    threshold: float = math.log(999),
) -> Tensor:
    """MADPO: pairs that a reward model finds close count more, clear ones less.

    With the margin h = r_chosen - r_rejected,
    c = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) exp(steepness (|h| - threshold)))
    and w = sigmoid(c h) / sigmoid(h) where h > -threshold, else 1  (arXiv:2510.05342, the authors'
    code). c is 1 at |h| = threshold, and w is 1 at h = 0.

    Args:
        chosen_scores: [B] scores of the chosen responses, of a reward model in log-odds.
        rejected_scores: [B] of the rejected ones.
        c_max: amplification of small margins, >= 1; 1 switches the weights off.
        c_min: of large ones, in [0, 1); 1 / c_max if None.
        steepness: the paper's lambda.
        threshold: the paper's tau; the margin of a preference of 0.999. The released module's own
            default is 2.

    Returns:
        [B] float32 or, for float64, float64; positive.

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> madpo_weights(torch.tensor([0.5, 3.0]), torch.zeros(2), threshold=2.0)
        tensor([1.0976, 0.9450])
    """
    name = "madpo_weights"
    check_like(name, "rejected_scores", rejected_scores, "chosen_scores", chosen_scores)
    if not 1 <= c_max < math.inf:
        raise fail(name, "c_max", "a finite number >= 1", repr(c_max), "1 switches it off.")
    c_min = 1 / c_max if c_min is None else c_min
    if not (0 <= c_min < 1 or c_min == c_max == 1):
        raise fail(name, "c_min", "a number in [0, 1)", repr(c_min), "Leave it out for 1 / c_max.")
    if not math.isfinite(steepness) or math.isnan(threshold):
        got, remedy = f"{steepness}, {threshold}", "Leave them out for 1 and log(999)."
        raise fail(name, "steepness, threshold", "a finite number and a number", got, remedy)
    margin_B = accumulation(chosen_scores) - accumulation(rejected_scores)
    if c_max == 1 and c_min == 1:
        return torch.ones_like(margin_B)
    offset = math.log((c_max - 1) / (1 - c_min)) if c_max > 1 else -math.inf
    falling_B = torch.sigmoid(steepness * (threshold - margin_B.abs()) - offset)
    c_B = c_min + (c_max - c_min) * falling_B
    weights_B = torch.exp(logsigmoid(c_B * margin_B) - logsigmoid(margin_B))
    return torch.where(margin_B > -threshold, weights_B, 1.0)


def wpo_weights(logprobs: Tensor, log_sum_sq_probs: Tensor, mask: Tensor) -> Tensor:
    """WPO: how likely the policy is to write a response, against what it is sure of anyway.

    w = exp(mean_t [log p(y_t) - log sum_v p_v^2])  (arXiv:2406.11827, as in TRL). A pair weighs
    w_chosen w_rejected, in :func:`fastpo.losses.wpo` or before any loss with ``reduction="none"``.
    1 for uniform next-token distributions; above 1 where the likeliest tokens are chosen.
    For packed tokens: ``fastpo.sequence_means(logprobs - log_sum_sq_probs, cu_seqlens=cu_seqlens)``
    and its exponential.

    Args:
        logprobs: [B, T] log-probs of the policy, nats.
        log_sum_sq_probs: [B, T] as of :func:`fastpo.linear_token_stats`, from the policy.
        mask: [B, T] bool, True at the tokens of the responses.

    Returns:
        [B] float32 or, for float64, float64; 1 for an empty response.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> uniform = torch.full((1, 3), 0.25).log()
        >>> wpo_weights(uniform, uniform, torch.ones(1, 3).bool())
        tensor([1.])
    """
    check_masks("wpo_weights", mask=mask)
    check_like("wpo_weights", "logprobs", logprobs, "mask", mask)
    check_like("wpo_weights", "log_sum_sq_probs", log_sum_sq_probs, "mask", mask)
    terms_BT = accumulation(logprobs) - accumulation(log_sum_sq_probs)
    sums_B = torch.where(mask, terms_BT, 0.0).sum(1)
    return torch.exp(sums_B / mask.sum(1).clamp(min=1))


def _check_passes(name: str, probs: Tensor) -> None:
    if probs.ndim != 3 or probs.shape[0] == 0:
        remedy = "Stack the class probabilities of several passes with dropout."
        raise fail(name, "probs", "[T, B, C] with T > 0", f"{list(probs.shape)}", remedy)


def bald(probs: Tensor) -> Tensor:
    """Uncertainty of an estimator about pairs, from several passes with dropout (BALD).

    U = H(mean of p) - mean of H(p), the information that the passes' disagreement holds; used by
    UPO (arXiv:2409.11212) with 10 passes.

    Args:
        probs: [T, B, C] class probabilities of T passes over B pairs.

    Returns:
        [B] nats, float32 or, for float64, float64; 0 where all passes agree.

    Raises:
        ValueError: the shape does not fit.

    Example:
        >>> bald(torch.tensor([[[0.5, 0.5]], [[0.5, 0.5]]]))
        tensor([0.])
    """
    check_tensors("weights.bald", probs=probs)
    _check_passes("bald", probs)
    probs_TBC = accumulation(probs)

    def entropy(p: Tensor) -> Tensor:
        return -(p * torch.log(p + _EPS)).sum(-1)

    return entropy(probs_TBC.mean(0)) - entropy(probs_TBC).mean(0)


def upo_filter(probs: Tensor) -> Tensor:
    """Which pairs most passes of the estimator agree with: class 0 says that the pair is right.

    (arXiv:2409.11212, the authors' code.) A draw of votes keeps the pair.

    Args:
        probs: [T, B, C] as in :func:`bald`.

    Returns:
        [B] bool.

    Raises:
        ValueError: the shape does not fit.

    Example:
        >>> upo_filter(torch.tensor([[[0.9, 0.1], [0.2, 0.8]]]))
        tensor([ True, False])
    """
    check_tensors("weights.upo_filter", probs=probs)
    _check_passes("upo_filter", probs)
    classes_C = torch.arange(probs.shape[2], device=probs.device)
    votes_BC = (probs.argmax(2)[..., None] == classes_C).sum(0)
    return votes_BC[:, 0] == votes_BC.amax(1)


def upo_weights(uncertainty: Tensor, prefer: str = "easy") -> Tensor:
    """UPO: probabilities with which pairs are drawn for training.

    Proportional to max(0, (1 - U) / sum (1 - U)) for ``easy`` and to max(0, U) for ``hard``
    (arXiv:2409.11212, the authors' code; uniform if all are 0). Draw without replacement, at most
    half of them: ``torch.multinomial(weights, count, generator=generator)``.

    Args:
        uncertainty: [B] of :func:`bald`, of the pairs that the filter left.
        prefer: ``easy`` (certain) or ``hard`` (uncertain) pairs.

    Returns:
        [B] with sum 1, float32 or, for float64, float64.

    Raises:
        ValueError: ``prefer`` is neither.

    Example:
        >>> upo_weights(torch.tensor([0.1, 0.3]), "hard")
        tensor([0.2500, 0.7500])
    """
    check_tensors("weights.upo_weights", uncertainty=uncertainty)
    if prefer not in ("easy", "hard"):
        remedy = "Pick one of them."
        raise fail("upo_weights", "prefer", "one of easy, hard", repr(prefer), remedy)
    uncertainty_B = accumulation(uncertainty)
    if prefer == "easy":
        certainty_B = 1 - uncertainty_B
        weights_B = (certainty_B / certainty_B.sum()).clamp(min=0)
    else:
        weights_B = uncertainty_B.clamp(min=0)
    total = weights_B.sum()
    return torch.where(total > 0, weights_B / total, 1 / max(len(weights_B), 1))
