"""Two-player games of a preference with a KL to a reference: how far a policy is from Nash."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.checks import check_tensors
from fastpo.inputs import Trained
from fastpo.losses._common import check_positive, fail


def dual_gap(policy: Trained, ref: Tensor, preferences: Tensor, beta: float) -> Tensor:
    """Duality gap of a policy in a tabular game; 0 at the Nash policy alone.

    The game's value of policy pi against mu is pi^T P mu - beta KL(pi || ref) + beta KL(mu || ref).
    The gap is what the best answer to pi gains over what pi holds against its worst opponent:
    beta log sum ref exp(P pi / beta) + beta log sum ref exp(-P^T pi / beta) + 2 beta KL(pi || ref)
    (arXiv:2503.08942).

    Args:
        policy: [N] log-probs of the policy over all responses, in nats.
        ref: [N] the same of the reference.
        preferences: [N, N] P, probability that the response of the row beats that of the column.
        beta: weight of the KL, > 0.

    Returns:
        0-d, differentiable in ``policy``; float32 or float64.

    Raises:
        ValueError: shapes do not fit or beta is out of range.

    Example:
        >>> uniform = torch.full((3,), 1 / 3).log()
        >>> cycle = torch.tensor([[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]])
        >>> abs(round(dual_gap(uniform, uniform, cycle, beta=0.5).item(), 4))
        0.0
    """
    check_tensors("losses.dual_gap", policy=policy, ref=ref, preferences=preferences)
    check_positive("dual_gap", "beta", beta)
    size = policy.shape[-1] if policy.ndim else 0
    if policy.shape != (size,) or ref.shape != (size,) or preferences.shape != (size, size):
        got = f"{list(policy.shape)}, {list(ref.shape)} and {list(preferences.shape)}"
        raise fail("dual_gap", "policy", "[N], [N] and [N, N]", got, "One entry per response.")
    dtype = torch.promote_types(policy.dtype, torch.float32)
    policy_N, ref_N = policy.to(dtype), ref.detach().to(dtype)
    preferences_NN = preferences.detach().to(dtype)
    probs_N = policy_N.exp()
    # The best answer and the worst opponent have closed forms: ref exp(+-gain / beta).
    # Sums in place of matrix products, which autocast would take in bfloat16.
    gains_N, losses_N = (
        (preferences_NN * probs_N).sum(1),
        (preferences_NN * probs_N[:, None]).sum(0),
    )
    best = torch.logsumexp(ref_N + gains_N / beta, 0)
    worst = torch.logsumexp(ref_N - losses_N / beta, 0)
    present_N = probs_N > 0  # 0 log 0 = 0
    kl = (probs_N * torch.where(present_N, policy_N - ref_N, 0.0)).sum()
    return beta * (best + worst + 2 * kl)
