"""OREO: a value function and a policy from single responses with a reward at their end."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastpo.checks import check_tensors
from fastpo.inputs import Trained
from fastpo.losses._common import (
    REDUCTIONS,
    Reduction,
    UnpairedOutput,
    check_choice,
    check_not_negative,
    check_positive,
    fail,
    reduce,
    unpaired_output,
)

LEVELS = ("token", "step")


def _check(tokens: dict[str, Tensor], rewards: Tensor) -> None:
    shape, device = tokens["policy"].shape, tokens["policy"].device
    for name, tensor in tokens.items():
        if tensor.ndim != 2 or tensor.shape != shape:
            expected, got = f"[B, T], {list(shape)} as policy", f"{list(tensor.shape)}"
            raise fail("oreo", name, expected, got, "Pad the responses to rows.")
        if tensor.device != device:
            remedy = "Move it with .to(device)."
            raise fail("oreo", name, f"device {device} as policy", f"{tensor.device}", remedy)
        if (tensor.dtype == torch.bool) != name.endswith("mask"):
            expected = "bool" if name.endswith("mask") else "real numbers"
            raise fail("oreo", name, expected, f"{tensor.dtype}", "Cast it.")
    if rewards.shape != shape[:1]:
        remedy = "Give one reward per response."
        raise fail("oreo", "rewards", f"[B], [{shape[0]}]", f"{list(rewards.shape)}", remedy)


def _mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """[B] mean over the mask; 0 where it is empty, and no gradient elsewhere."""
    return torch.where(mask_BT, values_BT, 0.0).sum(1) / mask_BT.sum(1).clamp(min=1)


def _suffix_sums(values_BT: Tensor) -> Tensor:
    return values_BT.flip(1).cumsum(1).flip(1)


def _next_state_sums(suffix_BT: Tensor, state_mask_BT: Tensor) -> Tensor:
    """[B, T] suffix sum at the first state behind each token; 0 where there is none."""
    width = suffix_BT.shape[1]
    columns_BT = torch.arange(width, device=suffix_BT.device).expand_as(suffix_BT)
    states_BT = torch.where(state_mask_BT, columns_BT, width)
    here_BT = pad(states_BT, (0, 1), value=width).flip(1).cummin(1).values.flip(1)
    return pad(suffix_BT, (0, 1)).gather(1, here_BT[:, 1:])


def oreo(
    policy: Trained,
    ref: Tensor,
    values: Trained,
    rewards: Tensor,
    action_mask: Tensor,
    state_mask: Tensor,
    kl: Trained | None = None,
    beta: float = 0.03,
    kl_weight: float = 0.01,
    level: Literal["token", "step"] = "token",
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """Offline reasoning optimisation: soft Bellman consistency of a policy and its value head.

    With u_t the log-ratios of the tokens, S_t = sum_{k >= t} u_k, the reward R of the response and
    [.] without gradient  (arXiv:2412.16145, the authors' code):

        value loss    mean over states t of (beta [S_t] + V_t - R)^2
        policy loss   mean over states t of (beta (u_t + [S_{t+1}]) + [V_t] - R)^2
        loss          value loss + policy loss + kl_weight * mean over actions of KL

    ``step`` level: in place of u_t all tokens up to the next state keep their gradient. The value
    loss trains the values alone and the other two the policy alone, so one sum serves both.

    Args:
        policy: [B, T] log-probs of the tokens, nats, any float dtype.
        ref: [B, T] under the reference model.
        values: [B, T] V_t, of the state before token t, in the unit of the rewards.
        rewards: [B] R of the whole response, such as 0 or 1.
        action_mask: [B, T] bool, True at the tokens that the policy wrote.
        state_mask: [B, T] bool, True at the positions with a value; at ``step`` level the first
            tokens of the steps. A response without any adds 0.
        kl: [B, T] KL(policy || reference) over the vocabulary, nats, with its gradient, as of
            ``fastpo.linear_divergence(..., kind="reverse_kl")``; None leaves the term out.
        beta: strength of the tie to the reference, > 0.
        kl_weight: weight of ``kl``, >= 0.
        level: ``token`` or ``step``.
        reduction: ``mean`` over responses, ``sum`` or ``none``.

    Returns:
        UnpairedOutput; the rewards are beta S_0, the metrics ``value_loss``, ``policy_loss`` and
        ``kl`` means over responses.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> row = lambda *x: torch.tensor([x])
        >>> mask = torch.ones(1, 3).bool()
        >>> inputs = (row(0.2, -0.3, 0.4), torch.zeros(1, 3), row(0.5, 0.6, 0.8), torch.ones(1))
        >>> out = oreo(*inputs, mask, mask)
        >>> round(out.metrics["policy_loss"].item(), 4), round(out.loss.item(), 4)
        (0.1447, 0.2894)
        >>> import fastpo
        >>> hidden, ref_hidden, head = torch.rand(1, 3, 8), torch.rand(1, 3, 8), torch.rand(20, 8)
        >>> kl = fastpo.linear_divergence(hidden, head, ref_hidden, kind="reverse_kl")
        >>> oreo(*inputs, mask, mask, kl).loss > out.loss
        tensor(True)
    """
    check_tensors(
        "losses.oreo",
        {"kl": kl},
        policy=policy,
        ref=ref,
        values=values,
        rewards=rewards,
        action_mask=action_mask,
        state_mask=state_mask,
    )
    check_positive("oreo", "beta", beta)
    check_not_negative("oreo", "kl_weight", kl_weight)
    check_choice("oreo", "level", level, LEVELS)
    check_choice("oreo", "reduction", reduction, REDUCTIONS)
    tokens = dict(policy=policy, ref=ref, values=values)
    tokens |= dict(action_mask=action_mask, state_mask=state_mask)
    _check(tokens if kl is None else tokens | {"kl": kl}, rewards)
    dtype = torch.float32
    for tensor in (policy, ref, values):
        dtype = torch.promote_types(dtype, tensor.dtype)
    values_BT = torch.where(state_mask, values.to(dtype), 0.0)
    ratios_BT = torch.where(action_mask, policy.to(dtype) - ref.detach().to(dtype), 0.0)
    suffix_BT = _suffix_sums(ratios_BT)
    rewards_B1 = rewards.detach().to(dtype)[:, None]
    value_loss_B = _mean((beta * suffix_BT.detach() + values_BT - rewards_B1) ** 2, state_mask)
    if level == "token":
        soft_BT = ratios_BT + pad(suffix_BT[:, 1:], (0, min(suffix_BT.shape[1], 1))).detach()
    else:
        next_BT = _next_state_sums(suffix_BT, state_mask)
        soft_BT = (suffix_BT - next_BT) + next_BT.detach()
    gap_BT = beta * soft_BT + values_BT.detach() - rewards_B1
    policy_loss_B = _mean(gap_BT**2, state_mask)
    zero_B = torch.zeros_like(value_loss_B)
    kl_B = zero_B if kl is None else _mean(kl.to(dtype), action_mask)
    loss_B = value_loss_B + policy_loss_B + kl_weight * kl_B
    parts = dict(value_loss=value_loss_B, policy_loss=policy_loss_B, kl=kl_B)
    metrics = {name: reduce(part_B, "mean") for name, part_B in parts.items()}
    # At an empty T there is no first column.
    return unpaired_output(loss_B, beta * suffix_BT[:, :1].sum(1), reduction, **metrics)
