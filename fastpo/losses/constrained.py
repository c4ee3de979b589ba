"""Policy-gradient losses with constraints: verdicts of judges, several objectives.

Log-probs are summed per response, in nats. Rewards and earlier policies never get a gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpo.advantages.crpg import crpg_rewards
from fastpo.bounds import hold
from fastpo.checks import check_tensors
from fastpo.inputs import Trained
from fastpo.losses._common import (
    REDUCTIONS,
    Reduction,
    UnpairedOutput,
    check_choice,
    check_flags,
    check_positive,
    fail,
    negative_log_likelihood,
    prepare,
    unpaired_output,
)


def crpg(
    policy: Trained,
    ref: Tensor,
    counts: Tensor,
    scores: Tensor,
    baseline_scores: Tensor,
    passed: Tensor,
    kl_max: float,
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """Calibrated-regularised policy gradient of CGPO.

    -sum_i L_i (R_i - mean R) / (all tokens), R = passed sigmoid(r - r_0) max(0, 1 - kl / kl_max),
    kl = L - L_ref of the response, r_0 the reward of a baseline answer (arXiv:2409.20370). The mean
    of R is over all responses of the batch. Each response carries its share, so that the mean of
    ``reduction="none"`` is the reduced loss.

    Args:
        policy: [B] summed log-probs of all prompts' responses, any float dtype, nats.
        ref: [B] the same under the reference.
        counts: [B] tokens.
        scores: [B] rewards r.
        baseline_scores: [B] rewards r_0 of the baseline answer of each response's prompt.
        passed: [B] bool, whether every judge passes the response.
        kl_max: kl from which on a response earns nothing, in nats, > 0; infinity switches it off.
        reduction: ``mean``, ``sum`` or ``none``.

    Returns:
        UnpairedOutput; the rewards are R.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> out = crpg(torch.tensor([-20.0, -15.0]), torch.tensor([-22.0, -23.0]),
        ...            torch.tensor([20, 15]), torch.tensor([1.0, 0.2]), torch.tensor([0.3, 0.3]),
        ...            torch.tensor([True, False]), kl_max=10.0)
        >>> round(out.loss.item(), 4)
        0.0382
    """
    check_choice("crpg", "reduction", reduction, REDUCTIONS)
    policy_B, ref_B, counts_B, scores_B, baseline_scores_B = prepare(
        "crpg",
        policy=policy,
        ref=ref,
        counts=counts,
        scores=scores,
        baseline_scores=baseline_scores,
    )
    check_flags("crpg", "passed", passed, policy_B)
    kl_B = (policy_B - ref_B).detach()
    rewards_B = crpg_rewards(scores_B, baseline_scores_B, passed, kl_B, kl_max)
    advantages_B = rewards_B - rewards_B.sum() / max(rewards_B.shape[0], 1)
    loss_B = negative_log_likelihood(policy_B * advantages_B, counts_B, "token_mean")
    return unpaired_output(loss_B, rewards_B, reduction)


def c_morl_barrier(
    policy: Trained,
    old_policy: Tensor,
    returns: Tensor,
    objective: int,
    beta: float = 0.9,
    t: float = 20.0,
    clip: float = 0.2,
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """Log barrier of C-MORL: keep the other objectives while one is maximised.

    -mean over j != objective of log(max(c_j - beta G_j, 0.001)) / t, c_j = clip(ratio) G_j, with
    G_j the mean return of objective j in the batch and ratio = exp(policy - old_policy)
    (arXiv:2410.02236); added to a clipped policy-gradient loss of the objective itself. The
    authors' code removes entry ``objective`` along the batch instead of along the objectives, which
    leaves the maximised objective in the barrier; this is the intended form.

    Where G_j <= 0 the barrier is constant: bring returns to a positive scale first. One objective
    alone has none, and 0 comes out.

    Args:
        policy: [B] summed log-probs of the responses, any float dtype, nats.
        old_policy: [B] the same under the policy that wrote them.
        returns: [B, J] return of each objective.
        objective: index of the one that is maximised.
        beta: share of its mean return that every other objective is to keep, > 0.
        t: sharpness, > 0.
        clip: range of the ratio around 1, in (0, 1).
        reduction: ``mean`` over responses, ``sum`` or ``none``.

    Returns:
        UnpairedOutput; the rewards are the clipped ratios.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> out = c_morl_barrier(torch.log(torch.tensor([1.1, 0.7])), torch.zeros(2),
        ...                      torch.tensor([[10.0, 4.0], [10.0, 4.0]]), objective=0)
        >>> round(out.loss.item(), 4)
        0.1783
    """
    check_tensors("losses.c_morl_barrier", returns=returns)
    check_positive("c_morl_barrier", "beta", beta)
    check_positive("c_morl_barrier", "t", t)
    check_choice("c_morl_barrier", "reduction", reduction, REDUCTIONS)
    if not 0 < clip < 1:
        raise fail("c_morl_barrier", "clip", "a number in (0, 1)", repr(clip), "Take 0.2.")
    if returns.ndim != 2 or not -returns.shape[1] <= objective < returns.shape[1]:
        got, remedy = f"{objective} and {list(returns.shape)}", "One column for each objective."
        raise fail("c_morl_barrier", "objective", "a column of returns [B, J]", got, remedy)
    columns = {f"returns[:, {j}]": column for j, column in enumerate(returns.unbind(1))}
    policy_B, old_policy_B, *columns = prepare(
        "c_morl_barrier", policy=policy, old_policy=old_policy, **columns
    )
    others = [column_B for j, column_B in enumerate(columns) if j != objective % len(columns)]
    # Clipped before the exponential, which is then finite for any log-ratio.
    log_ratio_B = policy_B - old_policy_B.detach()
    ratio_B = torch.exp(hold(log_ratio_B, math.log1p(-clip), math.log1p(clip)))
    loss_B = torch.zeros_like(ratio_B) * ratio_B
    for column_B in others:
        mean_return = column_B.detach().sum() / max(column_B.shape[0], 1)
        slack_B = (ratio_B - beta) * mean_return
        loss_B = loss_B - torch.log(hold(slack_B, low=1e-3)) / (t * len(others))
    return unpaired_output(loss_B, ratio_B, reduction)
