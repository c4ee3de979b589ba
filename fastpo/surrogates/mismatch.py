"""Sampler against trainer: corrections by name, weights and rejections.

The sampler (an inference engine) and the trainer give a token slightly different log-probs; u = old
- sampler. ``policy_loss`` corrects the policy term by exp(u) itself (``correction``); here are the
names under which this is known, and what needs more than one sequence.

To bypass the old policy (verl's bypass mode), give the sampler's log-probs as ``old_logprobs``: the
clipped ratio is then that of policy to sampler, and there is nothing left to correct. Or use method
``reinforce`` with ``weights=importance_weights(logprobs, sampler_logprobs, ...)``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpo.checks import check_tensors
from fastpo.ops._check import fail
from fastpo.sequences import sequence_means, sequence_sums
from fastpo.surrogates._inputs import Layout, active_tokens, check_tokens, per_token

# Settings of policy_loss: truncated importance sampling, its masked forms, and TRL's modes.
_CORRECTIONS = {
    "token_truncate": {"correction": "truncate"},
    "token_mask": {"correction": "mask"},
    "sequence_truncate": {"correction": "truncate", "correct_sequence": True},
    "sequence_mask": {"correction": "mask", "correct_sequence": True},
    "tis": {"correction": "truncate", "sampler_max": 2.0},
    "mis": {"correction": "mask", "correct_sequence": True, "sampler_max": 3.0},
    "icepop": {"correction": "mask", "sampler_min": 0.5, "sampler_max": 5.0},
}
CORRECTION_NAMES = tuple(_CORRECTIONS)
_LOG_MAX = 20.0
_RULES = (
    *("token_k1", "token_k2", "token_k3"),
    *("seq_sum_k1", "seq_sum_k2", "seq_sum_k3"),
    *("seq_mean_k1", "seq_mean_k2", "seq_mean_k3"),
    *("seq_max_k2", "seq_max_k3"),
)


def sampler_correction(
    name: str, minimum: float | None = None, maximum: float | None = None
) -> dict[str, str | float | bool]:
    """Settings of ``policy_loss`` for a correction known by name.

    With c = exp(u) of a token or exp(sum u) of a sequence: ``token_truncate`` and
    ``sequence_truncate`` clamp c to [minimum, maximum], ``token_mask`` and ``sequence_mask`` make
    it 0 outside (TRL ``vllm_importance_sampling_mode``). ``tis`` is ``token_truncate`` at 2, as in
    verl; ``mis`` is ``sequence_mask`` at 3, TRL's default; ``icepop`` is ``token_mask`` in
    [0.5, 5] (arXiv:2510.18855).

    Experimental: the bounds of ``icepop`` were not read in the paper.

    Args:
        name: one of ``CORRECTION_NAMES``.
        minimum: overrides the smallest ratio, >= 0.
        maximum: overrides the largest.

    Returns:
        ``correction`` and, where they are not the defaults, ``correct_sequence``, ``sampler_min``
        and ``sampler_max``.

    Raises:
        ValueError: the name is unknown.

    Example:
        >>> sampler_correction("tis", maximum=3.0)
        {'correction': 'truncate', 'sampler_max': 3.0}
    """
    if name not in _CORRECTIONS:
        expected = f"one of {', '.join(_CORRECTIONS)}"
        raise fail("surrogates.sampler_correction", "name", expected, repr(name), "Pick one.")
    given = {"sampler_min": minimum, "sampler_max": maximum}
    return _CORRECTIONS[name] | {n: value for n, value in given.items() if value is not None}


def _log_ratios(
    function: str,
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Layout, Tensor, Tensor]:
    """Layout, active tokens, and u, 0 where inactive or where the sampler has none."""
    given = {"sampler_logprobs": sampler_logprobs}
    layout = check_tokens(function, "old_logprobs", old_logprobs, mask, cu_seqlens, **given)
    sampler = per_token(function, "sampler_logprobs", sampler_logprobs, layout)
    layout = layout.widened(torch.promote_types(old_logprobs.dtype, sampler.dtype))
    active = active_tokens(mask, layout)
    u = old_logprobs.detach().to(layout.dtype) - sampler.to(layout.dtype)
    return layout, active, torch.where(active, u, 0.0).nan_to_num(nan=0.0)


def importance_weights(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    sequence: bool = True,
    maximum: float = 2.0,
    batch_normalize: bool = False,
) -> Tensor:
    """Truncated importance weights of sampler to trainer, for ``weights``, as in verl.

    min(exp(u_t), maximum), or with ``sequence`` min(exp(sum_t u_t), maximum), u held at +-20;
    divided by their mean with ``batch_normalize``, over tokens or over sequences with tokens.
    Without that, ``correction`` of :func:`policy_loss` does it in the op.

    Args:
        old_logprobs: [B, T] under the trainer's policy that sampled, or packed [N].
        sampler_logprobs: as reported by the sampler; NaN counts as equal.
        mask: bool, True for tokens of the response.
        cu_seqlens: [B + 1] cumulative lengths.
        sequence: one weight per sequence, in place of one per token.
        maximum: > 0.
        batch_normalize: mean 1 over the batch of this call.

    Returns:
        [B], or per token with 0 outside the mask; float32, or float64 for float64. No gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or ``maximum`` is not positive.

    Example:
        >>> old, sampler = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -3.0]])
        >>> importance_weights(old, sampler), importance_weights(old, sampler, sequence=False)
        (tensor([2.]), tensor([[1., 2.]]))
    """
    check_tensors("surrogates.importance_weights", sampler_logprobs=sampler_logprobs)
    function = "surrogates.importance_weights"
    if not maximum > 0:
        raise fail(function, "maximum", "a number > 0", repr(maximum), "2 is common.")
    arguments = (old_logprobs, sampler_logprobs, mask, cu_seqlens)
    layout, active, u = _log_ratios(function, *arguments)
    if sequence:
        u = sequence_sums(u, active, layout.offsets)
        active = sequence_sums(active.to(layout.dtype), active, layout.offsets) > 0
    weights = u.clamp(-_LOG_MAX, _LOG_MAX).exp().clamp(max=maximum)
    counted = torch.where(active, weights, 0.0)
    if batch_normalize:
        mean = counted.sum() / active.sum().clamp(min=1)
        weights, counted = weights / mean, counted / mean
    return weights if sequence else counted


def _sequence_max(values: Tensor, layout: Layout) -> Tensor:
    """Largest of the values of each sequence, all >= 0; 0 without tokens."""
    zeros_B = values.new_zeros(layout.sequences)
    if layout.offsets is None:
        return torch.cat([zeros_B[:, None], values], dim=1).amax(1)
    if not layout.sequences:
        return zeros_B
    return zeros_B.scatter_reduce(0, layout.sequence_of_token(), values, "amax")


def _bounds(function: str, rule: str, bounds: float | tuple[float, float]) -> tuple[float, float]:
    """Smallest and largest allowed value of the rule's k."""
    if rule not in _RULES:
        raise fail(function, "rules", f"rules among {', '.join(_RULES)}", repr(rule), "")
    is_k1 = rule.endswith("k1")
    if isinstance(bounds, tuple) and not is_k1:
        remedy = "Only k1 has a lower bound."
        raise fail(function, rule, "the largest allowed value", f"{bounds}", remedy)
    if isinstance(bounds, tuple):
        low, high = bounds
    else:
        low, high = (1 / bounds if is_k1 and bounds > 0 else 0.0), bounds
    if not (0 <= low <= high and high > 0):
        expected = "0 <= lower <= upper, upper > 0"
        raise fail(function, rule, expected, f"{bounds}", "A ratio u alone means [1/u, u].")
    if not is_k1:
        return -math.inf, high
    return math.log(low) if low else -math.inf, math.log(high)


def rollout_rejection_mask(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    rules: dict[str, float | tuple[float, float]],
) -> Tensor:
    """The mask without tokens or sequences whose sampler and trainer differ too much, as in verl.

    With u = old - sampler held at +-20: k1 = -u, k2 = u^2 / 2, k3 = e^u - 1 - u. A rule looks at
    one of them per token (``token_k1`` to ``token_k3``), or at its sum, mean or maximum over a
    sequence (``seq_sum_k1`` ..., ``seq_mean_k1`` ..., ``seq_max_k2``, ``seq_max_k3``); every rule
    must hold. k1 must lie in [log lower, log upper], k2 and k3 at or below their bound. Unlike a
    correction it changes the mask, and with it the divisors of the loss.

    Args:
        old_logprobs: [B, T] under the trainer's policy that sampled, or packed [N].
        sampler_logprobs: as reported by the sampler; NaN counts as equal.
        mask: bool, True for tokens of the response.
        cu_seqlens: [B + 1] cumulative lengths.
        rules: bounds by rule: (lower, upper) ratios for k1, where a number u means (1/u, u), and
            the largest k2 or k3.

    Returns:
        bool, shape of ``old_logprobs``; give it as ``mask`` of :func:`policy_loss`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a rule is unknown or out of range.

    Example:
        >>> old, sampler = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -3.0]])
        >>> rollout_rejection_mask(old, sampler, rules={"token_k1": 2.0})
        tensor([[ True, False]])
    """
    check_tensors("surrogates.rollout_rejection_mask", sampler_logprobs=sampler_logprobs)
    function = "surrogates.rollout_rejection_mask"
    bounds = {rule: _bounds(function, rule, value) for rule, value in rules.items()}
    arguments = (old_logprobs, sampler_logprobs, mask, cu_seqlens)
    layout, active, u = _log_ratios(function, *arguments)
    u = u.clamp(-_LOG_MAX, _LOG_MAX)
    kept = active
    for rule, (low, high) in bounds.items():
        over, _, kind = rule.rpartition("_")
        k = {"k1": -u, "k2": u.square() / 2, "k3": torch.expm1(u) - u}[kind]
        if over == "seq_sum":
            k = layout.to_tokens(sequence_sums(k, active, layout.offsets))
        elif over == "seq_mean":
            k = layout.to_tokens(sequence_means(k, active, layout.offsets))
        elif over == "seq_max":
            k = layout.to_tokens(_sequence_max(k, layout))
        kept = kept & (k >= low) & (k <= high)
    return kept
