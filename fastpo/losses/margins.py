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

from fastpo.losses._common import fail, prepare

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
    sides = {}
    for name, (chosen, rejected) in streams.items():
        sides |= {f"{name} chosen": chosen, f"{name} rejected": rejected}
    values = iter(prepare("margin", **sides))
    total_B = 0.0
    for name, (chosen_B, rejected_B) in zip(streams, zip(values, values, strict=True), strict=True):
        if coefficients[name] == 0:  # 0 * inf would be NaN
            continue
        difference_B = chosen_B - rejected_B
        total_B = total_B + coefficients[name] * (
            difference_B if name == "policy" else difference_B.detach()
        )
    return total_B if isinstance(total_B, Tensor) else torch.zeros_like(chosen_B)


def soft_logistic(margin_B: Tensor, label: Tensor | float = 1.0) -> Tensor:
    """[B] cross-entropy of a label q with the probability sigmoid(u).

    -[q logsigmoid(u) + (1 - q) logsigmoid(-u)] = -logsigmoid(u) + (1 - q) u: no log of q, and no
    difference of large numbers. Labels carry no gradient.

    Example:
        >>> soft_logistic(torch.tensor([0.15]), label=0.9)
        tensor([0.6360])
    """
    if isinstance(label, Tensor):
        rest_B = 1 - label.detach().to(margin_B)
    elif label == 1:  # 0 * inf would be NaN at an infinite margin
        return -logsigmoid(margin_B)
    else:
        rest_B = 1 - label
    return -logsigmoid(margin_B) + rest_B * margin_B


def squared(margin_B: Tensor, target: Tensor | float) -> Tensor:
    """[B] squared distance (u - t)^2 of the margin from its target. Targets carry no gradient.

    Example:
        >>> squared(torch.tensor([0.7]), target=1.0)
        tensor([0.0900])
    """
    target = target.detach().to(margin_B) if isinstance(target, Tensor) else target
    return (margin_B - target) ** 2
