"""Masks and weights of tokens that methods take from entropies, covariances and scores.

Ranks and quantiles are found by sorting with a fill value in inactive places: nothing waits for the
device, and shapes do not depend on the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastpo.checks import check_tensors
from fastpo.ops._check import check_float, fail
from fastpo.surrogates._inputs import (
    Layout,
    active_tokens,
    check_tokens,
    on_tokens,
    operand,
    per_token,
)

Gather = Callable[[Tensor], Tensor]


def _check_share(function: str, name: str, share: float) -> None:
    if not 0 < share <= 1:
        raise fail(function, name, "a share in (0, 1]", repr(share), "")


def _check_order(function: str, names: str, low: float, high: float) -> None:
    if not low < high:
        raise fail(function, names, "in rising order", f"{low} and {high}", "Swap them.")


def _linear_quantile(sorted_M: Tensor, count: Tensor, quantile: float) -> Tensor:
    """Quantile of the first ``count`` of sorted values, linear between neighbours."""
    place = quantile * (count - 1).clamp(min=0).double()
    low = place.floor()
    last = sorted_M.shape[0] - 1
    neighbours = torch.stack([low, low + 1]).long().clamp(max=last)
    # A share of 0 would multiply the infinity that lies behind the last value.
    neighbours = torch.minimum(neighbours, (count - 1).clamp(min=0))
    below, above = sorted_M.gather(0, neighbours)
    return torch.lerp(below, above, (place - low).to(sorted_M.dtype))


def top_entropy_mask(
    entropy: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    quantile: float = 0.2,
    gather: Gather | None = None,
) -> Tensor:
    """Tokens of the highest entropies of the batch, for ``policy_mask``.

    H_t >= the 1 - quantile quantile of the entropies of all tokens, linear between neighbours
    (arXiv:2506.01939; TRL ``top_entropy_quantile``).

    Args:
        entropy: [B, T] entropies of the tokens' distributions (nats), or packed [N].
        mask: bool, True for tokens of the response.
        cu_seqlens: [B + 1] cumulative lengths.
        quantile: share of the tokens that is kept, in (0, 1]; the paper has 0.2.
        gather: returns the values of all ranks side by side for a 1-d tensor; inactive places hold
            infinity, and so does any padding. None for the tokens of this call alone.

    Returns:
        bool, shape of ``entropy``; at least one token is kept where there is one.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the share is out of range.

    Example:
        >>> entropy = torch.tensor([[0.1, 1.4, 0.2], [0.05, 2.0, 0.0]])
        >>> mask = torch.tensor([[True, True, True], [True, True, False]])
        >>> top_entropy_mask(entropy, mask, quantile=0.4)
        tensor([[False,  True, False],
                [False,  True, False]])
    """
    function = "surrogates.top_entropy_mask"
    _check_share(function, "quantile", quantile)
    layout = check_tokens(function, "entropy", entropy, mask, cu_seqlens)
    active = active_tokens(mask, layout)
    values = torch.where(active, entropy.detach().to(layout.dtype), torch.inf)
    all_M = values.flatten() if gather is None else gather(values.flatten())
    if not all_M.shape[0]:
        return active
    count = (all_M < torch.inf).sum()
    threshold = _linear_quantile(all_M.sort().values, count, 1 - quantile)
    return active & (values >= threshold)


def _token_mean(values: Tensor, active: Tensor, count: Tensor) -> Tensor:
    return torch.where(active, values, 0.0).sum() / count.clamp(min=1)


def _covariances(
    logprobs: Tensor, advantages: Tensor, active: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Centred product of advantage and log-prob of every token, and the number of tokens."""
    values = logprobs.detach().to(layout.dtype)
    count = active.sum()
    centred = values - _token_mean(values, active, count)
    return (advantages - _token_mean(advantages, active, count)) * centred, count


def _first(keys: Tensor, share: float, count: Tensor) -> Tensor:
    """Where the max(1, int(share count)) smallest keys lie, ties by position."""
    order_M = keys.flatten().argsort(stable=True)
    places_M = torch.arange(order_M.shape[0], device=keys.device)
    ranks_M = torch.empty_like(order_M).scatter_(0, order_M, places_M)
    return (ranks_M < (share * count.double()).floor().clamp(min=1)).view_as(keys)


def token_covariances(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Share of every token in the covariance of advantage and log-prob, which drives the entropy.

    (A_t - mean A) (lp_t - mean lp), means over the tokens of the batch (arXiv:2505.22617; verl).

    Args:
        logprobs: [B, T] under the policy, or packed [N].
        advantages: [B], or per token.
        mask: bool, True for tokens of the response.
        cu_seqlens: [B + 1] cumulative lengths.

    Returns:
        Shape of ``logprobs``, 0 outside the mask; float32, or float64 for float64. No gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Example:
        >>> token_covariances(torch.tensor([[-1.0], [-3.0]]), torch.tensor([1.0, -1.0]))
        tensor([[1.],
                [1.]])
    """
    check_tensors("surrogates.token_covariances", advantages=advantages)
    function = "surrogates.token_covariances"
    layout = check_tokens(function, "logprobs", logprobs, mask, cu_seqlens, advantages=advantages)
    advantages = on_tokens(operand(function, "advantages", advantages, layout), layout)
    active = active_tokens(mask, layout)
    return torch.where(active, _covariances(logprobs, advantages, active, layout)[0], 0.0)


def clip_cov_mask(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    share: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Clip-Cov: all tokens but a random few of high covariance, for ``policy_mask``.

    Among tokens with covariance in (cov_low, cov_high) whose ratio PPO's clip does not stop, max(1,
    int(share N)) drawn at random lose their policy term (arXiv:2505.22617; verl).

    Args:
        logprobs: [B, T] under the policy, or packed [N].
        old_logprobs: under the old policy.
        advantages: [B], or per token.
        mask: bool, True for tokens of the response.
        cu_seqlens: [B + 1] cumulative lengths.
        share: of the N tokens, in (0, 1].
        cov_low: smallest covariance, exclusive.
        cov_high: largest, exclusive.
        clip_low: as in :func:`policy_loss`.
        clip_high: as in :func:`policy_loss`.
        generator: of the draw, on the device of the tokens.

    Returns:
        bool, shape of ``logprobs``, True where the policy term counts.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or an option is out of range.

    Example:
        >>> logps = torch.tensor([[-1.0, -0.5], [-4.0, -0.5]])
        >>> advantages = torch.tensor([1.0, -1.0])
        >>> clip_cov_mask(logps, logps, advantages)
        tensor([[ True,  True],
                [False,  True]])
    """
    check_tensors("surrogates.clip_cov_mask", old_logprobs=old_logprobs, advantages=advantages)
    function = "surrogates.clip_cov_mask"
    _check_share(function, "share", share)
    _check_order(function, "cov_low, cov_high", cov_low, cov_high)
    tensors = {"advantages": advantages, "old_logprobs": old_logprobs}
    layout = check_tokens(function, "logprobs", logprobs, mask, cu_seqlens, **tensors)
    old = per_token(function, "old_logprobs", old_logprobs, layout).to(layout.dtype)
    advantages = on_tokens(operand(function, "advantages", advantages, layout), layout)
    active = active_tokens(mask, layout)
    cov, count = _covariances(logprobs, advantages, active, layout)
    ratio = (logprobs.detach().to(layout.dtype) - old).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    stopped = ratio * advantages > clipped * advantages
    candidates = active & ~stopped & (cov > cov_low) & (cov < cov_high)
    keys = torch.rand(cov.shape, dtype=cov.dtype, device=cov.device, generator=generator)
    drawn = _first(torch.where(candidates, keys, torch.inf), share, count)
    return active & ~(candidates & drawn)


def kl_cov_penalties(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    share: float = 2e-4,
    coef: float = 0.1,
) -> Tensor:
    """KL-Cov: weights of |lp - old| at the tokens of highest covariance, for ``penalties``.

    coef at the max(1, int(share N)) tokens of highest covariance, 0 elsewhere (arXiv:2505.22617;
    verl).

    Args:
        logprobs: [B, T] under the policy, or packed [N].
        advantages: [B], or per token.
        mask: bool, True for tokens of the response.
        cu_seqlens: [B + 1] cumulative lengths.
        share: of the N tokens, in (0, 1].
        coef: weight, >= 0.

    Returns:
        Shape of ``logprobs``; float32, or float64 for float64.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or an option is out of range.

    Example:
        >>> logps = torch.tensor([[-1.0, -0.5], [-4.0, -0.5]])
        >>> advantages = torch.tensor([1.0, -1.0])
        >>> kl_cov_penalties(logps, advantages)
        tensor([[0.0000, 0.0000],
                [0.1000, 0.0000]])
    """
    check_tensors("surrogates.kl_cov_penalties", advantages=advantages)
    function = "surrogates.kl_cov_penalties"
    _check_share(function, "share", share)
    if not 0 <= coef < math.inf:
        raise fail(function, "coef", "a finite number >= 0", repr(coef), "")
    layout = check_tokens(function, "logprobs", logprobs, mask, cu_seqlens, advantages=advantages)
    advantages = on_tokens(operand(function, "advantages", advantages, layout), layout)
    active = active_tokens(mask, layout)
    cov, count = _covariances(logprobs, advantages, active, layout)
    first = _first(torch.where(active, -cov, torch.inf), share, count)
    return (first & active).to(layout.dtype) * coef


def _check_rows(function: str, rows: int, **values: Tensor) -> None:
    for name, tensor in values.items():
        check_float(function, name, tensor)
        if tuple(tensor.shape) != (rows,):
            got = f"{list(tensor.shape)}"
            raise fail(function, name, f"one value per sequence, [{rows}]", got, "")


def dagrpo_mask(
    distinctiveness: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    threshold: float,
) -> Tensor:
    """DaGRPO: the mask without sequences that are hardly told apart from the others.

    Experimental: the abstract of arXiv:2512.06337 masks pairs of low distinctiveness, and adds
    off-policy anchors, which are not here; the scores and the threshold of the paper were not seen.

    Args:
        distinctiveness: [B] scores of a scorer of your own.
        mask: bool [B, T], or packed [N].
        cu_seqlens: [B + 1] cumulative lengths.
        threshold: smallest score that stays.

    Returns:
        bool, shape of ``mask``; give it as ``mask`` of :func:`policy_loss`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Example:
        >>> dagrpo_mask(torch.tensor([0.9, 0.1]), torch.ones(2, 2).bool(), threshold=0.5)
        tensor([[ True,  True],
                [False, False]])
    """
    check_tensors("surrogates.dagrpo_mask", distinctiveness=distinctiveness, mask=mask)
    function = "surrogates.dagrpo_mask"
    tensors = {"distinctiveness": distinctiveness}
    values = torch.zeros(mask.shape, device=mask.device)
    layout = check_tokens(function, "mask", values, mask, cu_seqlens, **tensors)
    _check_rows(function, layout.sequences, **tensors)
    return active_tokens(mask, layout) & layout.to_tokens(distinctiveness >= threshold)


def etr_clip_bounds(
    advantages: Tensor,
    pass_rates: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    *,
    advantage_scale: float,
    pass_rate_scale: float,
) -> tuple[Tensor, Tensor]:
    """ETR: clip bounds that grow with |A| and with the variance of the group's pass rate.

    clip (1 + advantage_scale |A| + pass_rate_scale 4 p (1 - p)), for both bounds.

    Experimental: that bounds grow with both is from the abstract of arXiv:2601.03723; the paper's
    functions and constants were not seen, and the form is ours.

    Args:
        advantages: [B].
        pass_rates: [B] share p of correct responses in the group of each sequence.
        clip_low: bound at A = 0 and p in {0, 1}.
        clip_high: likewise.
        advantage_scale: >= 0; with both scales 0 it is PPO's clip.
        pass_rate_scale: >= 0.

    Returns:
        ``clip_low`` and ``clip_high`` [B] for :func:`policy_loss`.

    Raises:
        ValueError: shapes or dtypes do not fit, or an option is negative.

    Example:
        >>> low, high = etr_clip_bounds(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.5]),
        ...                             advantage_scale=0.1, pass_rate_scale=0.5)
        >>> [round(x, 4) for x in high.tolist()]
        [0.2, 0.34]
    """
    check_tensors("surrogates.etr_clip_bounds", advantages=advantages, pass_rates=pass_rates)
    function = "surrogates.etr_clip_bounds"
    numbers = {
        "clip_low": clip_low,
        "clip_high": clip_high,
        "advantage_scale": advantage_scale,
        "pass_rate_scale": pass_rate_scale,
    }
    for name, number in numbers.items():
        if not 0 <= number < math.inf:
            raise fail(function, name, "a finite number >= 0", repr(number), "")
    _check_rows(function, advantages.shape[0], advantages=advantages, pass_rates=pass_rates)
    spread_B = 4 * pass_rates * (1 - pass_rates)
    factor_B = 1 + advantage_scale * advantages.abs() + pass_rate_scale * spread_B
    return clip_low * factor_B.detach(), clip_high * factor_B.detach()
