"""Losses that fit the log-ratios of a group's responses to their rewards by least squares.

Tensors are [P, G]: P prompts with the G responses of each, groups of other sizes by a mask.
Padding may hold anything. ``reduction`` is over prompts. Rewards, baselines, references and earlier
policies never get a gradient.

A call must see groups as a whole: a batch is cut between groups, never inside one. Several ranks,
or micro-batches, each with equally many whole groups of its own, give the loss of the whole batch.
:func:`a2po` has its baseline given, and takes single responses [B].
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastpo.checks import check_tensors
from fastpo.inputs import Trained
from fastpo.losses._common import (
    REDUCTIONS,
    Reduction,
    UnpairedOutput,
    check_choice,
    check_positive,
    fail,
    prepare,
    unpaired_output,
)
from fastpo.losses._groups import check_kl, prepare_groups
from fastpo.losses._lists import masked_mean
from fastpo.weights._common import Memory

CONVENTIONS = ("smooth", "added")
BASELINES = ("mean", "log_z")
SCALINGS = ("squared_error", "policy_gradient")


def _standardized(values_PG: Tensor, mask_PG: Tensor, eps: float, convention: str) -> Tensor:
    """(value - mean) / std of each group, with the gradient through both; 0 at padding."""
    # Less the smallest: equal values centre to exactly 0, however large they are.
    low_P1 = values_PG.detach().masked_fill(~mask_PG, torch.inf).amin(1, keepdim=True)
    shifted_PG = torch.where(mask_PG, values_PG - low_P1, 0.0)
    centred_PG = torch.where(mask_PG, shifted_PG - masked_mean(shifted_PG, mask_PG)[:, None], 0.0)
    variance_P = centred_PG.square().sum(1) / (mask_PG.sum(1) - 1).clamp(min=1)
    if convention == "smooth":
        return centred_PG / (variance_P + eps**2).sqrt()[:, None]
    # The square root has no derivative at 0: there the std is the constant 0.
    spread_P = variance_P > 0
    std_P = torch.where(spread_P, torch.where(spread_P, variance_P, 1.0).sqrt(), 0.0)
    return centred_PG / (std_P + eps)[:, None]


def reg_grpo(
    policy: Trained,
    old_policy: Tensor,
    scores: Tensor,
    mask: Tensor | None = None,
    eps: float = 1e-4,
    convention: Literal["smooth", "added"] = "smooth",
    kl: Trained | None = None,
    kl_weight: float = 0.1,
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """Regressive GRPO: standardised log-ratios are fitted to standardised rewards.

    mean_i (A_i - B_i)^2 + kl_weight kl, A and B the rewards and the log-ratios policy - old_policy
    of the group, each less its mean and over its unbiased std  (arXiv:2506.07464; the paper prints
    the KL with the other sign inside a loss to be minimised). The gradient goes through mean and
    std; the loss is 0 where the log-ratios are a rising affine function of the rewards. At policy =
    old_policy the std is 0 and its floor ``eps`` sets the step: the gradient is -2 A / (G eps).

    Args:
        policy: [P, G] summed log-probs of the responses, nats, any float dtype.
        old_policy: [P, G] the same under the policy that wrote them.
        scores: [P, G] rewards.
        mask: [P, G] bool, True where there is a response; all of them if not given.
        eps: floor of the std, > 0, in nats for B and in units of the reward for A.
        convention: ``smooth``, sqrt(variance + eps^2), which has a derivative everywhere, or
            ``added``, std + eps, whose std counts as a constant where it is 0.
        kl: 0-d, the mean KL(policy || reference) with its gradient; None leaves the term out.
        kl_weight: weight of ``kl``, >= 0.
        reduction: ``mean`` over prompts, ``sum`` or ``none``; each prompt carries all of ``kl``.

    Returns:
        UnpairedOutput; the rewards [P, G] are B.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    The paper does not state floor, divisor of the variance and gradient through mean and std:
    these are our choice.

    Example:
        >>> out = reg_grpo(torch.tensor([[0.1, -0.2, 0.05, 0.3]]), torch.zeros(1, 4),
        ...                torch.tensor([[1.0, 0.0, 0.5, 1.0]]))
        >>> round(out.loss.item(), 3)
        0.135
    """
    check_positive("reg_grpo", "eps", eps)
    check_choice("reg_grpo", "convention", convention, CONVENTIONS)
    check_kl("reg_grpo", kl, kl_weight)
    check_choice("reg_grpo", "reduction", reduction, REDUCTIONS)
    policy_PG, old_policy_PG, scores_PG, mask_PG = prepare_groups(
        "reg_grpo", mask, policy=policy, old_policy=old_policy, scores=scores
    )
    ratio_PG = policy_PG - old_policy_PG.detach()
    wanted_PG = _standardized(scores_PG.detach(), mask_PG, eps, convention)
    fitted_PG = _standardized(ratio_PG, mask_PG, eps, convention)
    loss_P = masked_mean((wanted_PG - fitted_PG).square(), mask_PG)
    if kl is not None:
        loss_P = loss_P + kl_weight * kl
    return unpaired_output(loss_P, fitted_PG, reduction)


class RewardDifficulty(Memory):
    """How much harder than lately a prompt is: the curriculum of :func:`reg_grpo`.

    mean of the last ``window`` group means of the rewards, less the prompt's own group mean
    (arXiv:2506.07464). Above 0 a prompt is hard, and the paper adds a hint to it; below it is easy,
    and the paper adds noise to the frames; both in proportion to the difference.

    In training mode a call compares the batch with those before it, then takes it in; in evaluation
    mode it compares alone. Before any training all prompts are at 0. Register it in the model or
    save its ``state_dict``. Every rank has a memory of its own.

    Args:
        window: number of group means kept, >= 1.

    Example:
        >>> difficulty = RewardDifficulty()
        >>> difficulty(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        tensor([0., 0.])
        >>> difficulty(torch.tensor([[0.0, 0.5]]))
        tensor([0.5000])
    """

    def __init__(self, window: int = 100) -> None:
        if window < 1:
            remedy = "The paper keeps 100 group means."
            raise fail("RewardDifficulty", "window", "at least 1", repr(window), remedy)
        super().__init__()
        # NaN where nothing has been seen yet.
        self.register_buffer("recent", torch.full((window,), torch.nan, dtype=torch.float64))

    @torch.no_grad()
    def forward(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """[P] differences of rewards [P, G], in their dtype; 0 for a group without a response."""
        scores_PG, mask_PG = prepare_groups("RewardDifficulty", mask, scores=scores)
        is_known_P = mask_PG.any(1)
        means_P = masked_mean(scores_PG.double(), mask_PG)
        difference_P = torch.where(is_known_P, self.recent.nanmean() - means_P, 0.0)
        if self.training:
            means_P = means_P.masked_fill(~is_known_P, torch.nan)
            self.recent.copy_(torch.cat((self.recent, means_P))[-len(self.recent) :])
        return difference_P.nan_to_num(nan=0.0).to(scores_PG)


def _soft_values(scores_PG: Tensor, mask_PG: Tensor, temperature: float) -> Tensor:
    """[P] temperature * log mean exp(score / temperature) of each group; 0 for an empty one."""
    counts_P = mask_PG.sum(1)
    log_sum_P = (scores_PG / temperature).masked_fill(~mask_PG, -torch.inf).logsumexp(1)
    values_P = temperature * (log_sum_P - counts_P.clamp(min=1).to(log_sum_P).log())
    return torch.where(counts_P > 0, values_P, 0.0)


def a2po_values(scores: Tensor, mask: Tensor | None = None, beta: float = 0.5) -> Tensor:
    """Optimal values of prompts for :func:`a2po`, from responses of the reference model.

    V* = beta log mean_i exp(r_i / beta)  (arXiv:2505.20686, in the form of TRL's trainer; eight
    responses per prompt in the paper). No gradient. TRL can leave out prompts whose rewards are all
    0, and with them V*.

    Args:
        scores: [P, G] rewards of the reference model's responses.
        mask: [P, G] bool, True where there is a response; all of them if not given.
        beta: temperature, > 0; not that of the loss.

    Returns:
        [P] values in the unit of the rewards, float32, or float64 for float64 scores; 0 for a
        prompt without a response.

    Raises:
        ValueError: shapes or dtypes do not fit, or ``beta`` is out of range.

    Example:
        >>> a2po_values(torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]]))
        tensor([0.4772])
    """
    check_tensors("losses.a2po_values", {"mask": mask}, scores=scores)
    check_positive("a2po_values", "beta", beta)
    scores_PG, mask_PG = prepare_groups("a2po_values", mask, scores=scores.detach())
    return _soft_values(scores_PG, mask_PG, beta)


def a2po(
    policy: Trained,
    ref: Tensor,
    scores: Tensor,
    values: Tensor,
    beta: float = 1e-3,
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """A*-PO: the implicit reward of a response is fitted to its optimal advantage.

    (beta (policy - ref) - (r - V*))^2  (arXiv:2505.20686, in the form of TRL's trainer), from one
    response per prompt. :func:`a2po_values` gives V*.

    Args:
        policy: [B] summed log-probs of the responses, nats, any float dtype.
        ref: [B] the same under the reference model.
        scores: [B] rewards r.
        values: [B] V* of each response's prompt.
        beta: strength of the tie to the reference, > 0.
        reduction: ``mean`` over responses, ``sum`` or ``none``.

    Returns:
        UnpairedOutput; the rewards [B] are beta (policy - ref).

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> out = a2po(torch.tensor([2.0, -1.0]), torch.zeros(2), torch.tensor([1.0, 0.0]),
        ...            torch.tensor([0.4772, 0.4772]))
        >>> round(out.loss.item(), 4)
        0.249
    """
    check_positive("a2po", "beta", beta)
    check_choice("a2po", "reduction", reduction, REDUCTIONS)
    policy_B, ref_B, scores_B, values_B = prepare(
        "a2po", policy=policy, ref=ref, scores=scores, values=values
    )
    rewards_B = beta * (policy_B - ref_B.detach())
    loss_B = (rewards_B - (scores_B - values_B).detach()).square()
    return unpaired_output(loss_B, rewards_B, reduction)


def kimi_mdpo(
    policy: Trained,
    old_policy: Tensor,
    scores: Tensor,
    tau: float,
    mask: Tensor | None = None,
    baseline: Literal["mean", "log_z"] = "mean",
    scaling: Literal["squared_error", "policy_gradient"] = "squared_error",
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """Mirror descent of Kimi k1.5: log-ratios are fitted to rewards above a baseline.

    mean_i (r_i - b - tau (policy_i - old_policy_i))^2  (arXiv:2501.12599, section 2.3.2). The
    gradient of ``policy_gradient``, the same over 2 tau, is that of the report's equation 3: at
    policy = old_policy it is REINFORCE with advantages r - b. A new old policy goes with a new
    state of the optimiser.

    Args:
        policy: [P, G] summed log-probs of the responses, nats, any float dtype.
        old_policy: [P, G] the same under the policy at the start of the iteration, which wrote
            them.
        scores: [P, G] rewards r, which may hold a term of the length.
        tau: strength of the tie to the old policy, > 0; the report has no value.
        mask: [P, G] bool, True where there is a response; all of them if not given.
        baseline: ``mean`` of the group, which the authors use, or ``log_z``, tau log mean
            exp(r / tau), whose limit for large tau it is.
        scaling: ``squared_error``, or ``policy_gradient``.
        reduction: ``mean`` over prompts, ``sum`` or ``none``.

    Returns:
        UnpairedOutput; the rewards [P, G] are tau (policy - old_policy).

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> out = kimi_mdpo(torch.tensor([[2.0, -1.0]]), torch.zeros(1, 2),
        ...                 torch.tensor([[1.0, 0.0]]), tau=0.1)
        >>> round(out.loss.item(), 4)
        0.125
    """
    check_positive("kimi_mdpo", "tau", tau)
    check_choice("kimi_mdpo", "baseline", baseline, BASELINES)
    check_choice("kimi_mdpo", "scaling", scaling, SCALINGS)
    check_choice("kimi_mdpo", "reduction", reduction, REDUCTIONS)
    policy_PG, old_policy_PG, scores_PG, mask_PG = prepare_groups(
        "kimi_mdpo", mask, policy=policy, old_policy=old_policy, scores=scores
    )
    scores_PG = scores_PG.detach()
    rewards_PG = tau * (policy_PG - old_policy_PG.detach())
    if baseline == "mean":
        baseline_P = masked_mean(scores_PG, mask_PG)
    else:
        baseline_P = _soft_values(scores_PG, mask_PG, tau)
    gaps_PG = torch.where(mask_PG, scores_PG - baseline_P[:, None] - rewards_PG, 0.0)
    loss_P = masked_mean(gaps_PG.square(), mask_PG)
    if scaling == "policy_gradient":
        loss_P = loss_P / (2 * tau)
    return unpaired_output(loss_P, rewards_PG, reduction)
