"""Losses on the log-probs of denoising steps (``fastpo.diffusion.step_log_probs``).

:func:`clipped_dpo` compares steps of two trajectories. The policy gradients of DDPO
(arXiv:2305.13301), Flow-GRPO (arXiv:2505.05470) and DanceGRPO (arXiv:2505.07818) are
``fastpo.policy_loss`` with the steps of a trajectory in place of a response's tokens:

    advantages = ...  # [B], of fastpo.diffusion.advantages
    loss = fastpo.policy_loss(
        log_probs, advantages.clamp(-5, 5), old_logprobs=old_log_probs,  # [B, steps]
        clip_low=1e-4, clip_high=1e-4,
    ).loss

The bounds are that near to 1 because step log-probs are means over elements. One step at a time is
``log_probs[:, None]``. Flow-GRPO adds beta (0.04, or 0) times the mean of
``fastpo.diffusion.step_kl`` times -dt.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpo.bounds import hold
from fastpo.diffusion.losses._common import check_scale, prepare_errors
from fastpo.losses._common import (
    REDUCTIONS,
    LossOutput,
    Reduction,
    check_choice,
    fail,
    pair_output,
)


def clipped_dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    preferences: Tensor | None = None,
    beta: float = 0.1,
    clip: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """DPO on denoising steps, log-ratios clipped: D3PO, SPO and online PSO.

    -logsigmoid(beta h (rho_w - rho_l)), rho = log clip(exp(lp - lp_ref), 1 - clip, 1 + clip)
    (D3PO, arXiv:2311.13231, the authors' code; SPO, arXiv:2406.04314; PSO, arXiv:2410.03190). A
    step whose ratio has left the band, in either direction, gets no gradient.

    D3PO pairs steps of two trajectories (beta 0.1); SPO two next states of one state (beta 10); PSO
    the steps of a distilled model (beta 50). All have clip 0.1.

    Args:
        policy_chosen: [B] log-probs of the steps of the better sample, nats; flatten [B, steps].
        policy_rejected: [B] of the worse one.
        ref_chosen: [B] the same under the reference; no gradient.
        ref_rejected: [B] likewise.
        preferences: [B] h: 1 for a pair in this order, -1 for the other order, 0 for a tie, which
            adds log 2 and no gradient; 1 for all if not given.
        beta: strength of the tie to the reference, > 0.
        clip: half width of the band of ratios, in (0, 1).
        reduction: ``mean`` over pairs and steps, ``sum`` or ``none``.

    Returns:
        LossOutput; the rewards are beta rho.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> out = clipped_dpo(torch.tensor([-1.20]), torch.tensor([-1.40]), torch.tensor([-1.25]),
        ...                   torch.tensor([-1.38]), beta=10.0)
        >>> round(out.loss.item(), 4)
        0.4032
    """
    name = "diffusion.losses.clipped_dpo"
    check_scale(name, "beta", beta)
    check_choice(name, "reduction", reduction, REDUCTIONS)
    if not 0 < clip < 1:
        remedy = "The published codes have 0.1."
        raise fail(name, "clip", "a number in (0, 1)", repr(clip), remedy)
    given = {} if preferences is None else {"preferences": preferences.detach()}
    policy_chosen_B, policy_rejected_B, ref_chosen_B, ref_rejected_B, *signs = prepare_errors(
        name,
        remedy="Flatten log-probs [B, steps].",
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        **given,
    )
    low, high = math.log1p(-clip), math.log1p(clip)
    chosen_B = beta * hold(policy_chosen_B - ref_chosen_B.detach(), low, high)
    rejected_B = beta * hold(policy_rejected_B - ref_rejected_B.detach(), low, high)
    margins_B = chosen_B - rejected_B
    if signs:
        margins_B = signs[0] * margins_B
    return pair_output(-logsigmoid(margins_B), chosen_B, rejected_B, reduction)
