"""Preferences as a matter of regret: trajectory segments compared by what they fell short of."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastpo.checks import check_tensors
from fastpo.inputs import Trained
from fastpo.losses._common import (
    REDUCTIONS,
    LossOutput,
    Reduction,
    check_choice,
    check_finite,
    check_positive,
    fail,
    pair_output,
    prepare,
)
from fastpo.losses.margins import soft_logistic


def optimal_values(features: Tensor, weights: Tensor, temperature: float = 0.001) -> Tensor:
    """Soft maximum over policies of the values that their successor features give.

    v_k = weights . features_k,  V* = sum_k softmax(v / temperature)_k v_k  (the code released by an
    author of arXiv:2206.02231). Differentiable in both arguments.

    Args:
        features: [..., K, F] successor features of a state under K policies.
        weights: [F] weights of the reward features.
        temperature: of the soft maximum, > 0.

    Returns:
        [...] values, float32 or float64.

    Raises:
        ValueError: shapes do not fit or the temperature is out of range.

    Example:
        >>> optimal_values(torch.tensor([[1.0], [2.0], [0.5]]), torch.tensor([1.0]))
        tensor(2.)
    """
    check_tensors("losses.optimal_values", features=features, weights=weights)
    check_positive("optimal_values", "temperature", temperature)
    if features.ndim < 2 or weights.shape != features.shape[-1:]:
        got = f"{list(features.shape)} and {list(weights.shape)}"
        remedy = "Give one weight per feature."
        raise fail("optimal_values", "features, weights", "[..., K, F] and [F]", got, remedy)
    dtype = torch.promote_types(features.dtype, torch.float32)
    dtype = torch.promote_types(dtype, weights.dtype)
    # A sum in place of a matrix product, which autocast would take in bfloat16.
    values = (features.to(dtype) * weights.to(dtype)).sum(-1)
    return ((values / temperature).softmax(-1) * values).sum(-1)


def regret_pref(
    chosen_returns: Trained,
    rejected_returns: Trained,
    chosen_starts: Trained | None = None,
    chosen_ends: Trained | None = None,
    rejected_starts: Trained | None = None,
    rejected_ends: Trained | None = None,
    label: Tensor | float = 1.0,
    model: Literal["regret", "partial_return"] = "regret",
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    reduction: Reduction = "mean",
) -> LossOutput:
    """Preference between two segments by their deterministic regret, or by their partial return.

    dER = w_r sum r + w_T V*(s_T) - w_0 V*(s_0), which is minus the regret at weights 1;
    -q logsigmoid(dER_chosen - dER_rejected) - (1 - q) logsigmoid(dER_rejected - dER_chosen)
    (arXiv:2206.02231; the code released by an author). ``partial_return`` leaves the values out.
    The stochastic form is a logistic loss of summed optimal advantages; with beta log(policy /
    reference) in their place, as ``partial_return``, it is DPO on segments. The released code
    clamps probabilities at 1e-35; here the log is exact.

    Args:
        chosen_returns: [B] sums of rewards of the first segments, any float dtype.
        rejected_returns: [B] likewise of the second ones.
        chosen_starts: [B] V* of the first states of the first segments; with ``regret`` alone.
        chosen_ends: [B] V* of the states after the first segments; likewise.
        rejected_starts: [B] V* of the first states of the second segments; likewise.
        rejected_ends: [B] V* of the states after the second segments; likewise.
        label: q, a number or [B], share of votes for the first segment; no gradient.
        model: ``regret`` or ``partial_return``.
        weights: w_r, w_T and w_0.
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Returns:
        LossOutput; the rewards are dER. Returns and values carry the gradient.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> values = [torch.tensor([x]) for x in (1.2, 0.6, 2.0, 0.5, 1.7, 0.2)]
        >>> out = regret_pref(*values)
        >>> round(out.loss.item(), 4)
        0.4375
    """
    check_choice("regret_pref", "model", model, ("regret", "partial_return"))
    check_choice("regret_pref", "reduction", reduction, REDUCTIONS)
    for weight in weights:
        check_finite("regret_pref", "weights", weight)
    values = {
        "chosen_starts": chosen_starts,
        "chosen_ends": chosen_ends,
        "rejected_starts": rejected_starts,
        "rejected_ends": rejected_ends,
    }
    given = {name: value for name, value in values.items() if value is not None}
    if len(given) != (4 if model == "regret" else 0):
        expected = "four tensors [B] with regret, none with partial_return"
        remedy = 'Pass V* of all four states, or model="partial_return" and none.'
        raise fail("regret_pref", ", ".join(values), expected, f"{len(given)} of them", remedy)
    returns = {"chosen_returns": chosen_returns, "rejected_returns": rejected_returns}
    if isinstance(label, Tensor):
        given["label"] = label.detach()
    prepared = prepare("regret_pref", **returns, **given)
    chosen_B, rejected_B, *prepared = prepared
    if isinstance(label, Tensor):
        label = prepared.pop()
    elif not 0 <= label <= 1:
        raise fail("regret_pref", "label", "a number in [0, 1]", repr(label), "0.5 is a tie.")
    chosen_B, rejected_B = weights[0] * chosen_B, weights[0] * rejected_B
    if prepared:
        chosen_start_B, chosen_end_B, rejected_start_B, rejected_end_B = prepared
        chosen_B = chosen_B + weights[1] * chosen_end_B - weights[2] * chosen_start_B
        rejected_B = rejected_B + weights[1] * rejected_end_B - weights[2] * rejected_start_B
    return pair_output(soft_logistic(chosen_B - rejected_B, label), chosen_B, rejected_B, reduction)
