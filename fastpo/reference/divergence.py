"""Reference of ``divergence`` and ``divergence_grad``: two tiles of logits, row by row.

D = sum_v q_v f(p_v / q_v) of the policy p from the reference q, in a form of f with f(1) = f'(1) =
0, so that no term is negative. With t = log(p_v / q_v):

    forward_kl  f = r - 1 - log r                          r f' = r - 1         f - r f' = -t
    reverse_kl  f = r log r - r + 1                        f' = t               f - r f' = 1 - r
    js          w KL(p || m) + (1 - w) KL(q || m),  m = w p + (1 - w) q
                                                           f' = w log(p/m)      (1 - w) log(q/m)
    chi2        f = (r - 1)^2                              f' = 2 (r - 1)       1 - r^2
    alpha       f = (r^a - 1 - a (r - 1)) / (a (a - 1))    (r^(a-1) - 1) / (a - 1)   (1 - r^a) / a
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpo.reference._transform import scaled_logits
from fastpo.tiles import Tile


def _log_probs(z_policy_nv: Tensor, z_ref_nv: Tensor, rows_Rn: Tensor) -> tuple[Tensor, ...]:
    """Log p, log q and log(p / q), the last without the rounding of the first two."""
    max_p, log_sum_p, max_q, log_sum_q = rows_Rn[:4, :, None]
    below_p, below_q = z_policy_nv - max_p, z_ref_nv - max_q
    return below_p - log_sum_p, below_q - log_sum_q, (below_p - below_q) - (log_sum_p - log_sum_q)


def _parts(
    log_p: Tensor, log_q: Tensor, t: Tensor, kind: str, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Elementwise q f(r), p f'(r) and q (f(r) - r f'(r)); 0 where p = q = 0."""
    p, q = log_p.exp(), log_q.exp()
    near = t.abs() < 1
    small = t.clamp(-1, 1)

    def over(x: Tensor, y: Tensor) -> Tensor:
        return torch.where(near, x, y)

    def times(weight: Tensor, x: Tensor) -> Tensor:
        return torch.where(weight == 0, 0.0, weight * x)

    if kind == "forward_kl":
        value = over(q * (torch.expm1(small) - small), p - q - times(q, t))
        parts = value, over(q * torch.expm1(small), p - q), times(q, -t)
    elif kind == "reverse_kl":
        value = over(p * (torch.expm1(-small) + small), q - p + times(p, t))
        parts = value, times(p, t), over(-q * torch.expm1(small), q - p)
    elif kind == "js":
        # log(p/m) and log(q/m), by the one of the two that does not overflow.
        at_p = -torch.log1p((1 - alpha) * torch.expm1(-t.clamp(min=0)))
        at_q = -torch.log1p(alpha * torch.expm1(t.clamp(max=0)))
        at_p, at_q = (
            torch.where(t > 0, at_p, at_q + t),
            torch.where(t > 0, at_p - t, at_q),
        )
        of_p, of_q = times(alpha * p, at_p), times((1 - alpha) * q, at_q)
        parts = of_p + of_q, of_p, of_q
    elif kind == "chi2":
        square = torch.where(p == 0, 0.0, (log_p + t).exp())  # p^2 / q
        value = over(q * torch.expm1(small) ** 2, square - 2 * p + q)
        parts = (
            value,
            over(2 * p * torch.expm1(small), 2 * (square - p)),
            over(-q * torch.expm1(2 * small), q - square),
        )
    else:
        of_p = alpha > 0.5
        mixed = log_p + (alpha - 1) * t if of_p else log_q + alpha * t
        power = torch.where((p if of_p else q) == 0, 0.0, mixed.exp())  # p^a q^(1-a)
        scale = alpha * (alpha - 1)
        value = over(
            q * (torch.expm1(alpha * small) - alpha * torch.expm1(small)) / scale,
            (power - q - alpha * (p - q)) / scale,
        )
        parts = (
            value,
            over(p * torch.expm1((alpha - 1) * small), power - p) / (alpha - 1),
            over(-q * torch.expm1(alpha * small), q - power) / alpha,
        )
    nothing = (log_p == -math.inf) & (log_q == -math.inf)
    return tuple(torch.where(nothing, 0.0, part) for part in parts)


def divergence(
    policy: Tile, ref: Tile, rows_Rn: Tensor, divergences_n: Tensor, *, kind: str, alpha: float
) -> None:
    """Write the divergences and, into ``rows_Rn`` [6, n], what the gradient needs.

    The tiles span the whole vocabulary; their targets are not used. The rows are max and log-sum
    of the policy, max and log-sum of the reference, sum p f'(r), sum q (f(r) - r f'(r)).
    """
    logits = []
    for row, tile in ((0, policy), (2, ref)):
        z_nv, _ = scaled_logits(tile)
        rows_Rn[row] = z_nv.amax(1)
        rows_Rn[row + 1] = (z_nv - rows_Rn[row][:, None]).exp().sum(1).log()
        logits.append(z_nv)
    value_nv, policy_nv, ref_nv = _parts(*_log_probs(*logits, rows_Rn), kind, alpha)
    divergences_n.copy_(value_nv.clamp(min=0).sum(1))
    rows_Rn[4] = policy_nv.sum(1)
    rows_Rn[5] = ref_nv.sum(1)


def divergence_grad(
    policy: Tile,
    ref: Tile,
    rows_Rn: Tensor,
    grads_n: Tensor,
    grad_policy_nv: Tensor | None,
    grad_ref_nv: Tensor | None,
    *,
    kind: str,
    alpha: float,
) -> None:
    """Gradients of ``sum(grads * divergences)`` by the raw logits; either may be in place."""
    (z_policy_nv, cap_policy_nv), (z_ref_nv, cap_ref_nv) = (
        scaled_logits(policy),
        scaled_logits(ref),
    )
    log_p, log_q, t = _log_probs(z_policy_nv, z_ref_nv, rows_Rn)
    _, policy_nv, ref_nv = _parts(log_p, log_q, t, kind, alpha)
    sides = (
        (grad_policy_nv, policy_nv, log_p, rows_Rn[4], cap_policy_nv, policy),
        (grad_ref_nv, ref_nv, log_q, rows_Rn[5], cap_ref_nv, ref),
    )
    for out_nv, part_nv, log_nv, mean_n, cap_nv, tile in sides:
        if out_nv is not None:
            grad_nv = (part_nv - log_nv.exp() * mean_n[:, None]) * cap_nv
            grad_nv = grads_n[:, None] * grad_nv * (tile.scale / tile.temperature)
            grad_nv = torch.where(grads_n[:, None] == 0, 0.0, grad_nv)
            out_nv.copy_(grad_nv.to(out_nv.dtype))
