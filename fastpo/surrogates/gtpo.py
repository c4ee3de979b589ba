"""GTPO: tokens that correct and wrong responses share are spared."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.checks import check_operands, fail
from fastpo.groups import Groups
from fastpo.ops._check import check_float

_FUNCTION = "surrogates.gtpo_weights"


class GtpoWeights(NamedTuple):
    """Arguments of ``policy_loss`` with method ``gtpo``.

    Attributes:
        advantages: [B] filtered and shaped by the entropy.
        weights: [B, T] lambda / max(1, conflicts); 0 outside the mask.
        conflicts: int64 [B] number of conflict tokens of each response.
    """

    advantages: Tensor
    weights: Tensor
    conflicts: Tensor


def _shared(keys_BT: Tensor, sign_BT: Tensor) -> Tensor:
    """Whether a key of a column is found there with a positive and with a negative sign.

    Sorting a column brings equal keys together; what a run of them holds is a difference of
    cumulative sums at its two ends.
    """
    B = keys_BT.shape[0]
    sorted_BT, order_BT = keys_BT.sort(dim=0, stable=True)
    sign_BT = sign_BT.gather(0, order_BT)
    places_B = torch.arange(B, device=keys_BT.device)[:, None]
    is_start_BT = torch.ones_like(sorted_BT, dtype=torch.bool)
    is_start_BT[1:] = sorted_BT[1:] != sorted_BT[:-1]
    start_BT = torch.where(is_start_BT, places_B, 0).cummax(0).values
    is_end_BT = torch.ones_like(is_start_BT)
    is_end_BT[:-1] = is_start_BT[1:]
    end_BT = torch.where(is_end_BT, places_B, B).flip(0).cummin(0).values.flip(0)
    shared_BT = torch.ones_like(is_start_BT)
    for wanted in (1, -1):
        is_wanted_BT = sign_BT == wanted
        before_BT = is_wanted_BT.cumsum(0)
        in_run_BT = before_BT.gather(0, end_BT) - before_BT.gather(0, start_BT)
        shared_BT &= (in_run_BT + is_wanted_BT.gather(0, start_BT)) > 0
    return torch.empty_like(shared_BT).scatter_(0, order_BT, shared_BT)


def _conflicts(ids_BT: Tensor, index_B: Tensor, sign_BT: Tensor) -> Tensor:
    """Tokens of a response in the contiguous run of conflicts from column 0."""
    # One number per group and token: ids take the places below the largest of them.
    span = ids_BT.amax() - ids_BT.amin() + 1
    keys_BT = index_B[:, None] * span + (ids_BT - ids_BT.amin())
    conflict_BT = _shared(keys_BT, sign_BT) & (sign_BT != 0)
    return conflict_BT.to(torch.int32).cumprod(1).bool()


def gtpo_weights(
    ids: Tensor,
    mask: Tensor,
    advantages: Tensor,
    groups: Groups | Tensor | int,
    entropy: Tensor,
    *,
    entropy_coef: float = 0.1,
    entropy_max: float = 0.7,
    conflict_weight: float = 2.0,
) -> GtpoWeights:
    """GTPO's token weights and advantages, for ``policy_loss(..., method="gtpo")``.

    A token is in conflict if the same id is found at its place in a response of the group with A >
    0 and in one with A < 0, for all places from the first up to its own; likewise from the last
    token backwards. Each direction weighs a conflict token by 0 in a response with A < 0, by
    ``conflict_weight`` in one with A > 0, any other token by 1; lambda is the product. Then A := 0
    where H > entropy_max, else A - entropy_coef H, and l_i = -(A_i / n_i) sum_t lambda_t r_t /
    max(1, conflicts_i), r = 1 with a gradient (arXiv:2508.03772; the authors' code, which adds
    responses up: pass ``num_sequences=1`` for that).

    A token in conflict from both ends counts once in ``conflicts``.

    Args:
        ids: int64 [B, T] tokens of the responses, from column 0 on.
        mask: bool [B, T], True for the tokens of the response, without gaps.
        advantages: [B] reward minus mean of the group, such as of method ``dr_grpo``.
        groups: the size of every group, int ids [B], or :class:`fastpo.groups.Groups`.
        entropy: [B] mean entropy of each response's tokens (nats).
        entropy_coef: weight of the entropy in the advantage.
        entropy_max: responses above it get advantage 0; the authors' constant.
        conflict_weight: of conflict tokens of a response with A > 0.

    Returns:
        GtpoWeights in float32, or float64 for float64 advantages. No gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or an option is not finite.

    Example:
        >>> ids = torch.tensor([[5, 6, 7, 9], [5, 8, 7, 9]])
        >>> found = gtpo_weights(ids, torch.ones(2, 4).bool(), torch.tensor([0.5, -0.5]), 2,
        ...                      torch.tensor([0.2, 0.2]))
        >>> found.conflicts, found.weights * 3
        (tensor([3, 3]), tensor([[2., 1., 2., 2.],
                [0., 1., 0., 0.]]))
    """
    check_operands(_FUNCTION, ids=ids, mask=mask, advantages=advantages, entropy=entropy)
    if ids.ndim != 2 or ids.dtype != torch.int64:
        got = f"{ids.dtype} {list(ids.shape)}"
        raise fail(_FUNCTION, "ids", "int64 [B, T]", got, "Pad the responses on the right.")
    if mask.dtype != torch.bool or mask.shape != ids.shape:
        expected, got = f"torch.bool {list(ids.shape)}", f"{mask.dtype} {list(mask.shape)}"
        raise fail(_FUNCTION, "mask", expected, got, "Call .bool() on 0s and 1s.")
    for name, tensor in (("advantages", advantages), ("entropy", entropy)):
        check_float(_FUNCTION, name, tensor)
        if tensor.shape != ids.shape[:1]:
            expected = f"one value per sequence, [{ids.shape[0]}]"
            raise fail(_FUNCTION, name, expected, f"{list(tensor.shape)}", "One per row of ids.")
    numbers = {
        "entropy_coef": entropy_coef,
        "entropy_max": entropy_max,
        "conflict_weight": conflict_weight,
    }
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise fail(_FUNCTION, name, "a finite number", repr(number), "")
    B, T = ids.shape
    groups = Groups.of(groups, B, ids.device)
    index_B = groups.index
    dtype = torch.promote_types(torch.float32, advantages.dtype)
    advantages_B, entropy_B = advantages.detach().to(dtype), entropy.detach().to(dtype)
    shaped_B = advantages_B - entropy_coef * entropy_B
    shaped_B = torch.where(entropy_B > entropy_max, 0.0, shaped_B)
    if not ids.numel():
        nothing_B = torch.zeros(B, dtype=torch.int64, device=ids.device)
        return GtpoWeights(shaped_B, advantages_B.new_ones(B, T), nothing_B)
    grouped_B1 = (index_B < groups.count)[:, None]
    sign_BT = torch.where(mask & grouped_B1, advantages_B.sign()[:, None], 0.0)
    forward_BT = _conflicts(ids, index_B, sign_BT)
    # The last token of every response in the last column: shift rows by their padding.
    places_T = torch.arange(T, device=ids.device)
    shift_B = T - torch.where(mask, places_T + 1, 0).amax(1)
    from_BT = (places_T - shift_B[:, None]) % T
    shifted = (x.gather(1, from_BT).flip(1) for x in (ids, sign_BT))
    aligned_BT = _conflicts(next(shifted), index_B, next(shifted)).flip(1)
    backward_BT = aligned_BT.gather(1, (places_T + shift_B[:, None]) % T)
    factor_B = (advantages_B > 0).to(dtype) * conflict_weight
    weights_BT = mask.to(dtype)
    for conflict_BT in (forward_BT, backward_BT):
        weights_BT = torch.where(conflict_BT, weights_BT * factor_B[:, None], weights_BT)
    conflicts_B = (forward_BT | backward_BT).sum(1)
    return GtpoWeights(shaped_B, weights_BT / conflicts_B.clamp(min=1)[:, None], conflicts_B)
