"""What the group, surrogate and error kernels take besides tensors, for every backend alike."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from torch import Tensor

Record = TypeVar("Record", bound=tuple)

# Rows of the tensor group_stats gives [9, G, K]; csrc/fastpo.h says what each holds.
GROUP_ROWS = (
    "count", "mean", "m2", "abs", "min", "max", "second_max", "weight", "weighted_mean",
)  # fmt: skip

# Rows of the tensor token_surrogate gives [15, B].
SURROGATE_ROWS = (
    "tokens", "loss", "policy_loss", "kl", "ratio", "ratio_min", "ratio_max", "clipped_low",
    "clipped_high", "dual_clipped", "old_kl", "weight", "weight_sq", "sampler_gap",
    "sampler_gap_max",
)  # fmt: skip

SURROGATE_KINDS = ("clip", "cispo", "reinforce", "sapo", "vespo", "gmpo", "value")
RATIO_LEVELS = ("token", "sequence", "sequence_token", "sequence_sum")
KL_KINDS = ("none", "k1", "abs", "k2", "k3", "k3_plus")
CORRECTIONS = ("none", "truncate", "mask")


def replaced(record: Record, **changes: object) -> Record:
    """A NamedTuple with fields changed: ``_replace``, which dynamo knows from torch 2.13 on."""
    kind = type(record)
    fields = zip(kind._fields, record, strict=True)
    return kind(*[changes.get(name, value) for name, value in fields])


class GroupLayout(NamedTuple):
    """Which rows make up each group.

    Attributes:
        offsets: int64 [G + 1]; members of group g are ``order[offsets[g]:offsets[g + 1]]``.
        order: int64 row numbers; 0, 1, 2, ... if None.
        size: of every group where ``offsets`` is None; the last rows may be left over.
        count: G.
    """

    offsets: Tensor | None
    order: Tensor | None
    size: int
    count: int


class SurrogateInputs(NamedTuple):
    """Tensors of token_surrogate: per token as the log-probs, or per sequence as [B, 1].

    Log-probs are [B, T], or packed [N] with offsets, all of one dtype; the rest is in the
    accumulation dtype. ``csrc/fastpo.h`` has the formulas.
    """

    logprobs: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    sampler_logprobs: Tensor | None
    advantages: Tensor
    weights: Tensor | None
    penalties: Tensor | None
    clip_low: Tensor | None
    clip_high: Tensor | None


@dataclass(frozen=True)
class Surrogate:
    """Settings of token_surrogate; ``csrc/fastpo.h`` has the formulas."""

    kind: str = "clip"
    level: str = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    delta: float = math.inf
    dual_clip: float = math.inf
    tau_positive: float = 1.0
    tau_negative: float = 1.05
    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0
    log_ratio_max: float = 20.0
    kl: str = "none"
    beta: float = 0.0
    kl_max: float = math.inf
    unbiased_kl: bool = False
    correction: str = "none"
    correct_sequence: bool = False
    sampler_min: float = 0.0
    sampler_max: float = math.inf
    off_policy_max: float = math.inf

    def with_options(self, **options) -> Surrogate:
        """A copy with some settings changed."""
        return replace(self, **options)


# Elements of one partial sum of noise_errors; csrc/fastpo.h says which.
PART_ELEMENTS = 2048


# Fields of Residuals that may have a scale per sample, and these scales.
SCALED_FIELDS = ("prediction", "second_prediction", "target", "second_target")
SCALES = tuple(f"{name}_scale" for name in SCALED_FIELDS)


class Residuals(NamedTuple):
    """What noise_errors takes; ``csrc/fastpo.h`` has the formulas.

    Fields are views [N, A, S, I] in any layout and of any float dtype, scales are in the
    accumulation dtype, [N], None for 1.

    Attributes:
        target: [N, K, A, S, I].
        weights: in the accumulation dtype.
        mask: bool.
        huber: 0 for squared residuals.
    """

    prediction: Tensor
    second_prediction: Tensor | None
    target: Tensor
    second_target: Tensor | None
    reference: Tensor | None
    prediction_scale: Tensor | None
    second_prediction_scale: Tensor | None
    target_scale: Tensor | None
    second_target_scale: Tensor | None
    weights: Tensor | None
    mask: Tensor | None
    huber: float


def residuals(prediction: Tensor, target: Tensor, **optional: Tensor | float | None) -> Residuals:
    """Residuals of a prediction to a target [N, K, ...]; what is not named is not there."""
    fields = dict.fromkeys(Residuals._fields) | {"huber": 0.0} | optional
    return Residuals(**(fields | {"prediction": prediction, "target": target}))
