"""The one margin form behind most losses over pairs, and its two families.

u = sum_k c_k (L_chosen^k - L_rejected^k) over named streams of log-probs: the policy, its
reference, earlier policies. The logistic family is a cross-entropy on u, the squared family a
regression of u.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpo.checks import check_tensors
from fastpo.losses._common import check_finite, fail, prepare

Streams = Mapping[str, tuple[Tensor, Tensor]]


def margin(streams: Streams, coefficients: Mapping[str, float]) -> Tensor:
    """Margin of chosen over rejected responses, over several streams of log-probs.

    u = sum_k c_k (L_chosen^k - L_rejected^k). Only the stream ``policy`` carries a gradient.
    With coefficients 1 for the policy and -1 for its reference u is DPO's difference of log-ratios;
    histories give INPO (arXiv:2407.00617) and MNPO (arXiv:2509.23102).

    Args:
        streams: summed (or mean) log-probs [B] of chosen and rejected, in nats, by name.
        coefficients: c_k by the same names. A zero leaves its stream out.

    Returns:
        [B] float32, or float64 if any stream is.

    Raises:
        ValueError: names, shapes, devices or dtypes do not fit.

    Example:
        >>> sums = {"policy": (torch.tensor([-2.5]), torch.tensor([-2.7])),
        ...         "ref": (torch.tensor([-2.7]), torch.tensor([-2.2]))}
        >>> margin(sums, {"policy": 1.0, "ref": -1.0})
        tensor([0.7000])
    """
    if streams.keys() != coefficients.keys() or "policy" not in streams:
        got = f"streams {sorted(streams)} and coefficients {sorted(coefficients)}"
        remedy = "Give every stream its coefficient; the trained one is called policy."
        raise fail("margin", "coefficients", "the names of streams, policy included", got, remedy)
    for name, coefficient in coefficients.items():
        check_finite("margin", f"coefficients[{name!r}]", coefficient)
    chosen = {f"{name} chosen": pair[0] for name, pair in streams.items()}
    rejected = {f"{name} rejected": pair[1] for name, pair in streams.items()}
    values_B = prepare("margin", **chosen, **rejected)
    names, count = list(streams), len(streams)
    sides = [
        combine(dict(zip(names, side_B, strict=True)), coefficients)
        for side_B in (values_B[:count], values_B[count:])
    ]
    return sides[0] - sides[1]


def combine(streams: Mapping[str, Tensor], coefficients: Mapping[str, float]) -> Tensor:
    """One side of a margin, sum_k c_k L^k [B], of streams that were prepared together."""
    total_B = torch.zeros_like(streams["policy"])
    for name, values_B in streams.items():
        if coefficients[name]:  # 0 * inf would be NaN
            values_B = values_B if name == "policy" else values_B.detach()
            total_B = total_B + coefficients[name] * values_B
    return total_B


def _constant(loss: str, argument: str, value: Tensor, margin_B: Tensor) -> Tensor:
    """Detached, in the margin's dtype: one number, or one per margin and not [B, 1]."""
    if value.ndim and value.shape != margin_B.shape:
        expected, got = f"shape {list(margin_B.shape)} as the margin", f"{list(value.shape)}"
        raise fail(loss, argument, expected, got, "Give one value per margin.")
    return value.detach().to(margin_B)


def soft_logistic(margin_B: Tensor, label: Tensor | float = 1.0) -> Tensor:
    """[B] cross-entropy of a label q with the probability sigmoid(u).

    -[q logsigmoid(u) + (1 - q) logsigmoid(-u)] = -logsigmoid(u) + (1 - q) u: no log of q, and
    finite at any finite u. Labels carry no gradient: a number, or a tensor, 0-d or [B].

    Example:
        >>> soft_logistic(torch.tensor([0.15]), label=0.9)
        tensor([0.6360])
    """
    check_tensors("losses.soft_logistic", margin_B=margin_B)
    if isinstance(label, Tensor):
        rest_B = 1 - _constant("soft_logistic", "label", label, margin_B)
    elif label == 1:  # 0 * inf would be NaN at an infinite margin
        return -logsigmoid(margin_B)
    else:
        rest_B = 1 - label
    return -logsigmoid(margin_B) + rest_B * margin_B


def squared(margin_B: Tensor, target: Tensor | float) -> Tensor:
    """[B] squared distance (u - t)^2 of the margin from its target.

    Targets carry no gradient: a number, or a tensor, 0-d or [B].

    Example:
        >>> squared(torch.tensor([0.7]), target=1.0)
        tensor([0.0900])
    """
    check_tensors("losses.squared", margin_B=margin_B)
    if isinstance(target, Tensor):
        target = _constant("squared", "target", target, margin_B)
    return (margin_B - target) ** 2
