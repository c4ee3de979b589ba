"""Policy-gradient losses of a batch of sequences."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.checks import check_tensors
from fastpo.operands import Surrogate, SurrogateInputs, replaced
from fastpo.ops._check import check_float, fail
from fastpo.ops.segment_sums import segment_sums
from fastpo.ops.token_surrogate import token_surrogate
from fastpo.surrogates._inputs import (
    Layout,
    check_flags,
    check_tokens,
    on_tokens,
    operand,
    per_token,
)
from fastpo.surrogates._settings import preset_of, resolve
from fastpo.surrogates.aggregation import Count, aggregate, check_aggregation
from fastpo.surrogates.metrics import SequenceRows, policy_metrics, value_metrics

_POLICY = "surrogates.policy_loss"
_VALUE = "surrogates.value_loss"


class SurrogateOutput(NamedTuple):
    """What the losses of this package give.

    Attributes:
        loss: 0-d, to be differentiated; float32, or float64 for float64 log-probs.
        metrics: 0-d tensors without gradient, by name.
        per_sequence: sums over the tokens of each sequence.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    per_sequence: SequenceRows


def _surrogate(
    inputs: SurrogateInputs, settings: Surrogate, mask: Tensor | None, layout: Layout
) -> tuple[SequenceRows, Tensor]:
    """The rows with a differentiable loss, and all of them as one tensor without gradient."""
    loss_B, rows_RB = token_surrogate(inputs, settings, mask, layout.offsets)
    return replaced(SequenceRows(*rows_RB.unbind()), loss=loss_B), rows_RB


def _one_dtype(logprobs: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """All in the widest of their dtypes; half and bfloat16 together are float32."""
    dtype = logprobs.dtype
    for other in others:
        dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)
    return tuple(None if x is None else x.to(dtype) for x in (logprobs, *others))


def _check_optional(settings: Surrogate, needs: tuple[str, ...], **given: Tensor | None) -> None:
    """Tensors that the method and its settings need are there."""
    for name in needs:
        if given[name] is None:
            remedy = "fastpo.surrogates has a function that makes it."
            raise fail(_POLICY, name, "a tensor, for this method", "None", remedy)
    if settings.kl != "none" and given["ref_logprobs"] is None:
        remedy = "Pass the reference's log-probs, or leave beta and kl out."
        raise fail(_POLICY, "ref_logprobs", f"a tensor, for kl {settings.kl}", "None", remedy)
    if settings.correction != "none" and given["sampler_logprobs"] is None:
        remedy = "Pass the log-probs the sampler reported."
        expected = f"a tensor, for correction {settings.correction}"
        raise fail(_POLICY, "sampler_logprobs", expected, "None", remedy)


def _check_kind(
    settings: Surrogate, advantages: Tensor, policy_mask: Tensor | None, layout: Layout
) -> None:
    if settings.kind == "value":
        raise fail(_POLICY, "method", "a policy loss", "value", "Call value_loss.")
    if settings.kind != "gmpo":
        return
    if advantages.shape != (layout.sequences, 1):
        remedy = "A geometric mean of a sequence's ratios has one advantage."
        raise fail(_POLICY, "advantages", "[B] for kind gmpo", f"{list(advantages.shape)}", remedy)
    if policy_mask is not None:
        remedy = "Pass mask & policy_mask as mask: the geometric mean runs over mask."
        raise fail(_POLICY, "policy_mask", "None for kind gmpo", "a tensor", remedy)


def _masked_weights(
    weights: Tensor | None, policy_mask: Tensor | None, layout: Layout
) -> Tensor | None:
    """The weights, 0 where the policy term does not count."""
    if policy_mask is None:
        return weights
    if weights is None:
        return policy_mask.to(layout.dtype)
    return torch.where(policy_mask, on_tokens(weights, layout), 0.0)


def _sum_and_count(
    values: Tensor, mask: Tensor | None, flags: Tensor | None, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Of the tokens in a sequence, in the mask and with their flag set."""
    both = flags if mask is None else mask if flags is None else mask & flags
    sums_B, counts_B = segment_sums(values, None, None, both, layout.offsets)
    return sums_B.sum().to(layout.dtype), counts_B.sum().to(layout.dtype)


def _check_entropy(entropy: Tensor | None, entropy_coef: float, layout: Layout) -> None:
    if not (isinstance(entropy_coef, (int, float)) and math.isfinite(entropy_coef)):
        raise fail(_POLICY, "entropy_coef", "a finite number", repr(entropy_coef), "")
    if entropy is None:
        if entropy_coef:
            remedy = "linear_token_stats gives it."
            raise fail(_POLICY, "entropy", "a tensor, for entropy_coef", "None", remedy)
        return
    check_float(_POLICY, "entropy", entropy)
    if tuple(entropy.shape) != layout.shape:
        expected, got = f"one value per token, {list(layout.shape)}", f"{list(entropy.shape)}"
        raise fail(_POLICY, "entropy", expected, got, "Give it in the layout of the log-probs.")


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    weights: Tensor | None = None,
    penalties: Tensor | None = None,
    policy_mask: Tensor | None = None,
    method: str = "grpo",
    aggregation: str | None = None,
    num_tokens: Count | None = None,
    num_sequences: Count | None = None,
    max_length: int | None = None,
    accumulation_steps: int = 1,
    world_size: int = 1,
    clip_low: float | Tensor | None = None,
    clip_high: float | Tensor | None = None,
    **settings,
) -> SurrogateOutput:
    """Policy-gradient loss of a published method, from the log-probs of the sampled tokens.

    agg_t [w_t l(r_t, A_t) + beta kl_t + c_t |d_t|] - entropy_coef mean_t H_t, d = lp - old, r =
    exp(d) of a token or of its sequence. For ``grpo`` l = -min(r A, clip(r, 1 - clip_low, 1 +
    clip_high) A) (arXiv:2402.03300, arXiv:1707.06347 eq. 7); ``fastpo.surrogates.PRESETS`` has the
    settings and the source of every method, ``csrc/fastpo.h`` the formula of every kind. A token
    outside ``mask`` counts nowhere. ``weights``, ``policy_mask`` and what corrects for the sampler
    act on the policy term alone and change no divisor. All tensors but ``logprobs`` and ``entropy``
    are constants of the method: one that requires a gradient is detached here and gets none.

    Ratios are formed from log-ratios held at +-``log_ratio_max`` (20), without gradient beyond. A
    tie of two branches of a minimum takes the gradient of the unclipped one: at r = 1 it is that of
    REINFORCE.

    Args:
        logprobs: [B, T] log-probs of the tokens under the policy (nats), or packed [N] with
            ``cu_seqlens``; float32, bfloat16, float16 or float64. The one input with a gradient,
            besides ``entropy``.
        advantages: [B], or one per token. Wherever both will do, packed [N] with N = B has to mean
            the same read either way; [B, 1] is always per sequence.
        mask: bool, True for tokens of the response; all tokens if not given.
        cu_seqlens: [B + 1] int32 or int64 cumulative lengths.
        old_logprobs: the same tokens under the policy that was updated from; ``logprobs`` as
            constants if not given (ratio 1), which is right for the first update on a batch.
        ref_logprobs: under the reference, for the KL. Given without ``beta``, the KL is a metric.
        sampler_logprobs: as reported by the sampler, NaN where it has none; for ``correction``,
            ``off_policy_max`` and metrics. ``fastpo.surrogates.mismatch`` says how to bypass the
            old policy.
        entropy: per token (nats), of the policy, differentiable.
        entropy_coef: weight of the mean entropy that is subtracted.
        weights: factors of the policy term, [B] or per token.
        penalties: weights of |d|, [B] or per token; :func:`kl_cov_penalties`.
        policy_mask: bool per token, where the policy term and the entropy count, such as
            :func:`top_entropy_mask`.
        method: a preset; :func:`method_names` lists them.
        aggregation: overrides the preset's; the table is in ``fastpo.surrogates.aggregation``.
        num_tokens: tokens in the masks of all ranks and calls of an optimiser step, a number or a
            0-d tensor; for ``token_mean``.
        num_sequences: sequences of all of them, for means over sequences; see :func:`aggregate`.
        max_length: for ``fixed_length`` and ``fixed_sum``.
        accumulation_steps: calls that add up to one optimiser step.
        world_size: ranks, whose gradients are averaged.
        clip_low: distance from 1 to the lower bound of the ratio, [B] or per token if a tensor.
        clip_high: distance to the upper bound. TRL's ``epsilon_high`` of CISPO is 1 + clip_high.
        settings: other fields of ``fastpo.operands.Surrogate``: ``kind``, ``level``, ``delta``,
            ``dual_clip``, ``beta``, ``kl`` (k3 if there are ``ref_logprobs``), ``kl_max``,
            ``unbiased_kl``, ``correction``, ``correct_sequence``, ``sampler_min``, ``sampler_max``
            (see :func:`sampler_correction`), ``off_policy_max`` (arXiv:2512.02556, TRL's
            ``off_policy_mask_threshold``: sequences with A < 0 whose mean of sampler - policy
            log-probs exceeds it are left out), ``log_ratio_max``, ``tau_...`` of SAPO, ``k_...``
            and ``lambda_...`` of VESPO.

    Returns:
        SurrogateOutput; ``fastpo.surrogates.metrics`` lists the ``metrics`` and where those of the
        same name differ in TRL.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, an option is unknown, out of range, not
            read by the method or at odds with another, or a tensor that one needs is missing.

    Example:
        >>> logps = torch.tensor([[-0.5, -1.2], [-0.7, -2.0]], requires_grad=True)
        >>> old = torch.tensor([[-0.6, -1.0], [-0.9, -1.5]])
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> out = policy_loss(logps, torch.tensor([1.0, -1.0]), mask, old_logprobs=old)
        >>> out.loss.backward()
        >>> [round(x, 4) for x in logps.grad.flatten().tolist()]
        [-0.2763, -0.2047, 0.6107, 0.0]
    """
    check_tensors("surrogates.policy_loss", advantages=advantages)
    preset = preset_of(_POLICY, method)
    bounds = {"clip_low": clip_low, "clip_high": clip_high}
    tensors = {name: bound for name, bound in bounds.items() if isinstance(bound, Tensor)}
    numbers = {n: b for n, b in bounds.items() if b is not None and n not in tensors}
    if ref_logprobs is not None:
        settings = {"kl": "k3"} | settings
    resolved = resolve(_POLICY, preset, settings | numbers, tuple(tensors))
    optional = {
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "sampler_logprobs": sampler_logprobs,
        "weights": weights,
        "penalties": penalties,
        "policy_mask": policy_mask,
    }
    layout = check_tokens(
        _POLICY,
        "logprobs",
        logprobs,
        mask,
        cu_seqlens,
        advantages=advantages,
        entropy=entropy,
        **optional,
        **tensors,
    )
    _check_optional(resolved, preset.needs, **optional)
    check_flags(_POLICY, "policy_mask", policy_mask, layout)
    _check_entropy(entropy, entropy_coef, layout)
    scaling = {
        "num_tokens": num_tokens,
        "num_sequences": num_sequences,
        "max_length": max_length,
        "accumulation_steps": accumulation_steps,
        "world_size": world_size,
    }
    aggregation = preset.aggregation if aggregation is None else aggregation
    check_aggregation(_POLICY, aggregation, device=layout.device, **scaling)
    names = ("old_logprobs", "ref_logprobs", "sampler_logprobs")
    others = (per_token(_POLICY, name, optional[name], layout) for name in names)
    logprobs, *others = _one_dtype(logprobs, *others)
    layout = layout.widened(logprobs.dtype)
    advantages = operand(_POLICY, "advantages", advantages, layout)
    _check_kind(resolved, advantages, policy_mask, layout)
    weights = operand(_POLICY, "weights", weights, layout)
    inputs = SurrogateInputs(
        logprobs,
        *others,
        advantages,
        _masked_weights(weights, policy_mask, layout),
        operand(_POLICY, "penalties", penalties, layout),
        *(operand(_POLICY, name, tensors.get(name), layout) for name in bounds),
    )
    rows, rows_RB = _surrogate(inputs, resolved, mask, layout)
    total = aggregate(rows.loss, rows.tokens, aggregation, **scaling)
    policy = aggregate(rows.policy_loss, rows.tokens, aggregation, **scaling)
    sampler, sampled = inputs.sampler_logprobs, None
    if sampler is not None:
        sampled = _sum_and_count(sampler, mask, ~sampler.isnan(), layout)[1]
    metrics = policy_metrics(rows_RB, resolved, policy, inputs, sampled)
    if entropy is not None:
        sum_, tokens = _sum_and_count(entropy, mask, policy_mask, layout)
        mean = sum_ / tokens.clamp(min=1)
        metrics |= {"entropy": mean.detach(), "entropy_tokens": tokens}
        if entropy_coef:
            total = total - entropy_coef * mean / accumulation_steps
    return SurrogateOutput(total, {"loss": total.detach()} | metrics, rows)


def value_loss(
    values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    old_values: Tensor | None = None,
    clip: float = 0.2,
    aggregation: str = "token_mean",
    num_tokens: Count | None = None,
    num_sequences: Count | None = None,
    max_length: int | None = None,
    accumulation_steps: int = 1,
    world_size: int = 1,
) -> SurrogateOutput:
    """PPO's clipped squared error of a value head.

    agg_t max((v - R)^2, (clip(v, old - clip, old + clip) - R)^2) / 2 (arXiv:1506.02438 for R; the
    clip is that of the PPO implementations, here as in verl).

    Args:
        values: [B, T] values of the states before the tokens, or packed [N] with ``cu_seqlens``.
        returns: one per token, or [B].
        mask: bool, True for tokens that count.
        cu_seqlens: [B + 1] cumulative lengths.
        old_values: the same values when the batch was collected; no clip without.
        clip: how far a value may move from the old one, >= 0.
        aggregation: as in :func:`policy_loss`, with the arguments after it.

    Returns:
        SurrogateOutput with the metrics ``loss``, ``clip_fraction`` and ``tokens``.

    Raises:
        ValueError: as in :func:`policy_loss`.

    Example:
        >>> value_loss(torch.tensor([[0.2, 0.9]]), torch.tensor([[1.0, 1.0]])).loss
        tensor(0.1625)
    """
    check_tensors("surrogates.value_loss", returns=returns)
    layout = check_tokens(
        _VALUE, "values", values, mask, cu_seqlens, returns=returns, old_values=old_values
    )
    if not clip >= 0:
        raise fail(_VALUE, "clip", "a number >= 0", repr(clip), "0.2 is common.")
    bounds = {"clip_low": clip, "clip_high": clip}
    settings = resolve(_VALUE, preset_of(_VALUE, "value"), bounds)
    scaling = {
        "num_tokens": num_tokens,
        "num_sequences": num_sequences,
        "max_length": max_length,
        "accumulation_steps": accumulation_steps,
        "world_size": world_size,
    }
    check_aggregation(_VALUE, aggregation, device=layout.device, **scaling)
    values, old_values = _one_dtype(values, per_token(_VALUE, "old_values", old_values, layout))
    layout = layout.widened(values.dtype)
    nothing = dict.fromkeys(SurrogateInputs._fields)
    returns = operand(_VALUE, "returns", returns, layout)
    given = {"logprobs": values, "old_logprobs": old_values, "advantages": returns}
    rows, rows_RB = _surrogate(SurrogateInputs(**(nothing | given)), settings, mask, layout)
    total = aggregate(rows.loss, rows.tokens, aggregation, **scaling)
    return SurrogateOutput(total, value_metrics(rows_RB, total), rows)
