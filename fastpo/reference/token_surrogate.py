"""Reference of ``token_surrogate``: losses by plain formulas, gradients by autograd."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fastpo.bounds import hold
from fastpo.operands import SURROGATE_ROWS, Surrogate, SurrogateInputs
from fastpo.reference.segment_sums import sequences

_LOW = math.log(1e-8)


def _hold(x: Tensor, most: float) -> Tensor:
    """Within +-most, without gradient beyond."""
    return hold(x, -most, most)


def _either(condition: Tensor, x: float, y: float, like: Tensor) -> Tensor:
    """One of two numbers, in the dtype of ``like``: of plain numbers where() makes float32."""
    return torch.where(condition, like.new_tensor(x), like.new_tensor(y))


def _tokens(tensor: Tensor | None, b: int, sequence, active: Tensor, shape) -> Tensor | None:
    """An input's values at the active tokens of a sequence, in one dimension."""
    if tensor is None:
        return None
    if tensor.shape != shape:  # per sequence, [B, 1]
        return tensor[b].expand(int(active.sum()))
    return tensor[sequence][active]


def _log_ratio(s: Surrogate, d: Tensor) -> Tensor:
    """Of every token, held."""
    if s.level == "token":
        return _hold(d, s.log_ratio_max)
    total = d.sum() if s.level == "sequence_sum" else d.mean()
    held = _hold(total, s.log_ratio_max).expand_as(d)
    return held.detach() + d - d.detach() if s.level == "sequence_token" else held


def _is_held(s: Surrogate, d: Tensor) -> Tensor:
    """Whether the ratio of a sequence is held, where its tokens get no gradient of their own."""
    return d.mean().abs() > s.log_ratio_max


def _gap(old: Tensor, sampler: Tensor) -> Tensor:
    """Log-ratio of old policy to sampler, 0 where that is NaN."""
    u = old - sampler
    return torch.where(u.isnan(), 0.0, u)


def _correction(s: Surrogate, u: Tensor) -> Tensor:
    """Ratios of old policy to sampler, corrected, of every token."""
    u = u.sum().expand_as(u) if s.correct_sequence else u
    ratio = _hold(u, s.log_ratio_max).exp()
    if s.correction == "truncate":
        return ratio.clamp(s.sampler_min, s.sampler_max)
    inside = (ratio >= s.sampler_min) & (ratio <= s.sampler_max)
    return torch.where(inside, ratio, 0.0)


def _vespo_weight(s: Surrogate, d: Tensor, correction: Tensor | None, a: Tensor) -> Tensor:
    log_w = d.clamp(-20, 20).sum()
    if correction is not None:
        logs = correction.log().clamp(_LOW, 20)
        log_w = log_w + (logs[0] if s.correct_sequence else logs.sum())
    log_w = log_w.clamp(_LOW, 20)
    k = _either(a >= 0, s.k_positive, s.k_negative, a)
    lam = _either(a >= 0, s.lambda_positive, s.lambda_negative, a)
    return (lam + k * log_w - lam * log_w.exp()).exp().detach()


def _kl(s: Surrogate, x: Tensor) -> Tensor:
    x = _hold(x, s.log_ratio_max)
    k3 = torch.expm1(x) - x
    if s.kl == "k1":
        kl = -x
    elif s.kl == "abs":
        kl = x.abs()
    elif s.kl == "k2":
        kl = x.square() / 2
    elif s.kl == "k3":
        kl = k3
    else:
        k2 = x.square() / 2
        kl = k3.detach() + k2 - k2.detach()
    return torch.where(kl > s.kl_max, s.kl_max, kl)


def _sequence(s: Surrogate, values: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Rows of one sequence of at least one token."""
    lp, a = values["logprobs"], values["advantages"]
    old = lp.detach() if values["old_logprobs"] is None else values["old_logprobs"]
    sampler = values["sampler_logprobs"]
    low, high = values["clip_low"], values["clip_high"]
    low = torch.full_like(a, s.clip_low) if low is None else low
    high = torch.full_like(a, s.clip_high) if high is None else high
    d = lp - old
    log_ratio = _log_ratio(s, d)
    if s.level == "sequence_token" and _is_held(s, d):
        log_ratio = log_ratio.detach()
    ratio = log_ratio.exp()
    u = torch.zeros_like(d) if sampler is None else _gap(old.detach(), sampler)
    correction = None if s.correction == "none" or sampler is None else _correction(s, u)

    clamped = hold(ratio, 1 - low, 1 + high)
    below, above = (ratio < 1 - low) & (a < 0), (ratio > 1 + high) & (a > 0)
    stopped = torch.zeros_like(below)
    if s.kind == "clip":
        capped = torch.where(ratio > s.delta, s.delta, ratio)
        policy = -torch.minimum(capped * a, clamped * a)
        stopped = (ratio > s.delta) & (a < 0)
        if s.dual_clip < math.inf:
            most = torch.where(a < 0, -a * s.dual_clip, math.inf)
            stopped = stopped | (policy > most)
            policy = torch.where(policy > most, most, policy)
    elif s.kind == "cispo":
        policy = -clamped.detach() * a * lp
    elif s.kind == "reinforce":
        policy = -a * lp
    elif s.kind == "sapo":
        tau = _either(a > 0, s.tau_positive, s.tau_negative, a)
        policy = -a * (4 / tau) * torch.sigmoid(tau * (ratio - 1))
    elif s.kind == "vespo":
        policy = -_vespo_weight(s, d, correction, a) * a * lp
    elif s.kind == "gmpo":
        above, low_or_zero = (d > high) & (a > 0), (d < -low) & (a <= 0)
        clipped = torch.where(above, high, torch.where(low_or_zero, -low, d))
        below = low_or_zero & (a < 0)
        ratio = _hold(clipped.mean(), s.log_ratio_max).exp().expand_as(d)
        policy = -a * ratio
    else:
        errors = (lp - a).square(), (hold(lp, old - low, old + high) - a).square()
        below, above = torch.zeros_like(below), errors[1] > errors[0]
        policy = torch.where(errors[1] <= errors[0], *errors) / 2

    weights = torch.ones_like(a) if values["weights"] is None else values["weights"]
    if correction is not None and s.kind != "vespo":
        weights = weights * correction
    behaviour = old if sampler is None else torch.where(sampler.isnan(), lp, sampler)
    drift = (behaviour - lp).detach().mean()
    weights = torch.where((a < 0) & (drift > s.off_policy_max), 0.0, weights)

    kl = torch.zeros_like(lp)
    if s.kl != "none":
        kl = _kl(s, values["ref_logprobs"] - lp)
        kl = kl * ratio if s.unbiased_kl else kl
    penalty = 0.0
    if values["penalties"] is not None:
        penalty = values["penalties"] * _hold(d, s.log_ratio_max).abs()
    terms = weights * policy
    policy_loss = terms.mean() if s.level == "sequence_sum" else terms.sum()
    held = _hold(d, s.log_ratio_max)
    return {
        "tokens": torch.tensor(len(lp)),
        "loss": policy_loss + (s.beta * kl + penalty).sum(),
        "policy_loss": policy_loss,
        "kl": kl.sum(),
        "ratio": ratio.sum(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "clipped_low": below.sum(),
        "clipped_high": above.sum(),
        "dual_clipped": stopped.sum(),
        "old_kl": (torch.expm1(held) - held).sum(),
        "weight": weights.sum(),
        "weight_sq": weights.square().sum(),
        "sampler_gap": u.abs().sum(),
        "sampler_gap_max": u.abs().max(),
    }


def _write(
    inputs: SurrogateInputs,
    s: Surrogate,
    mask: Tensor | None,
    offsets: Tensor | None,
    rows_RB: Tensor,
    grads: Tensor | None,
) -> None:
    acc, shape = rows_RB.dtype, inputs.logprobs.shape
    everywhere = torch.ones(shape, dtype=torch.bool, device=rows_RB.device)
    mask = everywhere if mask is None else mask
    empty = dict.fromkeys(SURROGATE_ROWS, 0.0) | {"ratio_min": math.inf, "ratio_max": -math.inf}
    for b, sequence in enumerate(sequences(inputs.logprobs, offsets)):
        active = mask[sequence]
        found = empty
        values = {
            name: _tokens(tensor, b, sequence, active, shape)
            for name, tensor in inputs._asdict().items()
        }
        values = {n: None if x is None else x.detach().to(acc) for n, x in values.items()}
        leaf = values["logprobs"].requires_grad_()
        if leaf.numel():
            found = _sequence(s, values)
        for r, name in enumerate(SURROGATE_ROWS):
            rows_RB[r, b] = torch.as_tensor(found[name]).detach()
        if grads is None:
            continue
        grads[sequence] = 0.0
        if leaf.numel() and found["loss"].requires_grad:
            (grad,) = torch.autograd.grad(found["loss"], leaf)
            grads[sequence] = torch.zeros_like(grads[sequence]).masked_scatter(active, grad)


def token_surrogate(
    inputs: SurrogateInputs,
    settings: Surrogate,
    *,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    rows_RB: Tensor,
    grads: Tensor | None,
) -> None:
    """Rows of each sequence, and the gradient of each one's loss; both are written.

    ``rows_RB`` [15, B] and ``grads``, shaped as the log-probs and contiguous, are in the
    accumulation dtype. ``grads`` of packed positions in no sequence are not written.
    """
    # In a thread of its own: inside an op, autograd records nothing in the calling thread.
    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(_write, inputs, settings, mask, offsets, rows_RB, grads).result()
