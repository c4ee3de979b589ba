"""Metrics of a loss from the sums of its sequences: 0-d tensors, without waiting for the device.

Means are over the tokens of the call; ratios and clips of a sequence's ratio are averaged over
sequences, as TRL does. A batch without tokens gives 0, and 1 for ratios.

All is of one call: ranks and calls are for the trainer to combine. TRL uses the same names, but

- has the KL in ``policy_loss``, and logs it before the division by ``accumulation_steps``;
- averages ``entropy`` over all tokens, here it is over those of ``policy_mask``;
- calls ``clip_ratio/high_mean`` of CISPO ``cispo_clip_ratio``;
- averages clips at level ``sequence`` over tokens where advantages are per token, and those of
  GMPO with a mask of top entropies over all tokens;
- takes those of the sampler from the generation batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.operands import Surrogate, SurrogateInputs, replaced

_SEQUENCE_LEVELS = ("sequence", "sequence_sum")


class SequenceRows(NamedTuple):
    """Sums over the tokens of each sequence, [B]; all but ``loss`` without gradient.

    Attributes:
        tokens: how many there are.
        loss: policy term, beta KL and penalties, differentiable. Of level ``sequence_sum`` the
            policy term is one value of the sequence, not a sum.
        policy_loss: policy term of ``loss``.
        kl: KL from the reference, before beta.
        ratio: ratios of policy to old policy.
        ratio_min: smallest, inf without tokens.
        ratio_max: largest, -inf without tokens.
        clipped_low: tokens below the lower bound with A < 0.
        clipped_high: tokens above the upper bound with A > 0; clipped ones of a value loss.
        dual_clipped: tokens at ``delta`` or ``dual_clip``.
        old_kl: k3 of the old policy from this one.
        weight: weights of the policy term, the sampler's correction included.
        weight_sq: their squares.
        sampler_gap: |old - sampler| log-probs.
        sampler_gap_max: the largest of them.
    """

    tokens: Tensor
    loss: Tensor
    policy_loss: Tensor
    kl: Tensor
    ratio: Tensor
    ratio_min: Tensor
    ratio_max: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    dual_clipped: Tensor
    old_kl: Tensor
    weight: Tensor
    weight_sq: Tensor
    sampler_gap: Tensor
    sampler_gap_max: Tensor


def _extreme(values_B: Tensor, largest: bool, is_empty: Tensor, otherwise: float) -> Tensor:
    """Smallest or largest of the values, or ``otherwise`` without tokens."""
    if not values_B.shape[0]:
        return values_B.new_full((), otherwise)
    found = values_B.amax() if largest else values_B.amin()
    return found.masked_fill(is_empty, otherwise)


def policy_metrics(
    rows_RB: Tensor,
    settings: Surrogate,
    policy_loss: Tensor,
    inputs: SurrogateInputs,
    sampled: Tensor | None,
) -> dict[str, Tensor]:
    """Metrics of a policy loss by the names trainers use.

    ``policy_loss`` (scaled as the loss), ``tokens``, ``ratio/mean``, ``/min`` and ``/max``,
    ``approx_kl`` (k3 of the old policy from this one); for a clipped ratio
    ``clip_ratio/low_mean``, ``/low_min``, ``/high_mean``, ``/high_max``, ``/region_mean``, and
    ``clip_ratio/dual_mean``; ``kl`` with a reference; ``weights/mean`` and
    ``weights/effective_sample_size`` ((sum w)^2 / sum w^2 over the tokens' number) with weights;
    ``sampling/sampling_logp_difference/mean`` and ``/max`` with a sampler, over the ``sampled``
    tokens that have a log-prob of it.
    """
    rows, sums_R = SequenceRows(*rows_RB.unbind()), rows_RB.sum(1)
    B, tokens = rows_RB.shape[1], sums_R[0]
    is_empty_B, is_empty = rows.tokens == 0, tokens == 0
    shares_RB = rows_RB / rows.tokens.clamp(min=1)
    sums, shares = SequenceRows(*sums_R.unbind()), SequenceRows(*shares_RB.unbind())
    token_means = SequenceRows(*(sums_R / tokens.clamp(min=1)).unbind())
    means = token_means
    if settings.level in _SEQUENCE_LEVELS:
        means = SequenceRows(*(shares_RB.sum(1) / max(B, 1)).unbind())
        # A sequence without tokens has ratio 1, and counts.
        ratios_B = shares.ratio.masked_fill(is_empty_B, 1.0)
        means = replaced(means, ratio=ratios_B.sum() / max(B, 1))

    metrics = {"policy_loss": policy_loss.detach(), "tokens": tokens}
    if settings.kl != "none":
        metrics["kl"] = token_means.kl
    metrics |= {
        "ratio/mean": means.ratio.masked_fill(is_empty, 1.0),
        "ratio/min": _extreme(rows.ratio_min, False, is_empty, 1.0),
        "ratio/max": _extreme(rows.ratio_max, True, is_empty, 1.0),
        "approx_kl": token_means.old_kl,
    }
    if settings.kind in ("clip", "cispo", "gmpo"):
        low_B = shares.clipped_low.masked_fill(is_empty_B, torch.inf)
        metrics |= {
            "clip_ratio/low_mean": means.clipped_low,
            "clip_ratio/low_min": _extreme(low_B, False, is_empty, 0.0),
            "clip_ratio/high_mean": means.clipped_high,
            "clip_ratio/high_max": _extreme(shares.clipped_high, True, is_empty, 0.0),
            "clip_ratio/region_mean": means.clipped_low + means.clipped_high,
        }
    if settings.kind == "clip":
        metrics["clip_ratio/dual_mean"] = means.dual_clipped
    has_weights = inputs.weights is not None or settings.correction != "none"
    if has_weights or settings.off_policy_max < float("inf"):
        smallest = torch.finfo(tokens.dtype).tiny
        size = token_means.weight * sums.weight / sums.weight_sq.clamp(min=smallest)
        metrics |= {"weights/mean": token_means.weight, "weights/effective_sample_size": size}
    if sampled is not None:
        prefix = "sampling/sampling_logp_difference"
        metrics[f"{prefix}/mean"] = sums.sampler_gap / sampled.clamp(min=1)
        metrics[f"{prefix}/max"] = _extreme(rows.sampler_gap_max, True, is_empty, 0.0)
    return metrics


def value_metrics(rows_RB: Tensor, loss: Tensor) -> dict[str, Tensor]:
    """``loss``, ``tokens`` and ``clip_fraction``, the share of tokens with a clipped value."""
    sums = SequenceRows(*rows_RB.sum(1).unbind())
    clipped = sums.clipped_high / sums.tokens.clamp(min=1)
    return {"loss": loss.detach(), "tokens": sums.tokens, "clip_fraction": clipped}
