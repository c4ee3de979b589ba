"""DPO with more than two responses or more than one policy: rationales, fast and slow adapters.

Inputs, a, b and d are those of :mod:`fastpo.losses.pairwise`.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from fastpo.checks import check_tensors
from fastpo.inputs import Over, Trained
from fastpo.losses._common import (
    REDUCTIONS,
    LossOutput,
    Reduction,
    check_choice,
    check_not_negative,
    log_ratios,
    mean_logprobs,
    pair_output,
    prepare,
    reduce,
)
from fastpo.losses.margins import soft_logistic
from fastpo.losses.reference_free import orpo

_RATIONALE = Over("a rationale, given the prompt and both responses")


def rationale_rdpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    extra: Annotated[Trained, _RATIONALE],
    beta: float = 0.1,
    gamma: float = 0.001,
    reduction: Reduction = "mean",
) -> LossOutput:
    """DPO plus the likelihood of a rationale for the preference.

    -logsigmoid(beta d) - logsigmoid(gamma S_rationale)  (arXiv:2407.14477, authors' code): the
    likelihood is squashed, not a plain NLL; at gamma = 0 it is the constant log 2. Other arguments,
    result and errors are those of :func:`dpo`.

    Args:
        extra: [B] summed log-probs of the rationale, given the prompt and both responses.
        gamma: scale of the rationale, >= 0.

    Example:
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2)]
        >>> round(rationale_rdpo(*sums, torch.tensor([-12.0]), beta=0.5).loss.item(), 4)
        1.2325
    """
    check_not_negative("rationale_rdpo", "gamma", gamma)
    chosen_B, rejected_B = log_ratios(
        "rationale_rdpo", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    chosen_B, rejected_B, extra_B = prepare(
        "rationale_rdpo", policy_chosen=chosen_B, policy_rejected=rejected_B, extra=extra
    )
    loss_B = soft_logistic(beta * (chosen_B - rejected_B)) + soft_logistic(gamma * extra_B)
    return pair_output(loss_B, beta * chosen_B, beta * rejected_B, reduction)


def rationale_rorpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    chosen_counts: Tensor,
    rejected_counts: Tensor,
    extra: Annotated[Trained, _RATIONALE],
    extra_counts: Tensor,
    beta: float = 0.1,
    gamma: float = 0.001,
    reduction: Reduction = "mean",
) -> LossOutput:
    """ORPO plus the likelihood of a rationale for the preference.

    :func:`orpo` - logsigmoid(gamma S_rationale / n_rationale)  (arXiv:2407.14477), without a
    reference. Other arguments, result and errors are those of :func:`orpo`.

    Args:
        extra: [B] summed log-probs of the rationale, given the prompt and both responses.
        extra_counts: [B] its tokens.
        gamma: scale of the rationale, >= 0.

    Example:
        >>> sums, counts = torch.tensor([[-2.5], [-2.7]]), torch.tensor([[3], [2]])
        >>> extra = torch.tensor([-12.0]), torch.tensor([6])
        >>> round(rationale_rorpo(*sums, *counts, *extra).loss.item(), 4)
        1.565

    The rationale term is by analogy with the authors' DPO form: of this one their code was read in
    outline alone.
    """
    check_not_negative("rationale_rorpo", "gamma", gamma)
    check_choice("rationale_rorpo", "reduction", reduction, REDUCTIONS)
    out = orpo(
        policy_chosen, policy_rejected, chosen_counts, rejected_counts, beta, reduction="none"
    )
    loss_B, extra_B, extra_counts_B = prepare(
        "rationale_rorpo", policy_chosen=out.loss, extra=extra, extra_counts=extra_counts
    )
    loss_B = loss_B + soft_logistic(gamma * mean_logprobs(extra_B, extra_counts_B))
    return pair_output(loss_B, out.chosen_rewards, out.rejected_rewards, reduction, **out.metrics)


def ofs_dpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    slow_chosen: Trained,
    slow_rejected: Trained,
    alpha: float,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """OFS-DPO: two adapters of one model chase each other, the fast one led by its lead.

    With D = d of the fast and of the slow adapter F and S over the same frozen reference, and
    L_FS = -logsigmoid(beta (D_F - D_S)):

    loss = [dpo(F) + alpha L_FS, S held] + [dpo(S) - alpha L_FS, F held]  (arXiv:2406.05534, eq. 3
    to 6): F widens its lead, S closes the gap. In the sum the values of L_FS cancel, their
    gradients do not. The second bracket has no lower bound once S has overtaken F: every few steps
    the adapter with the smaller DPO loss becomes F. (The port that was read clamps margins to +-10,
    which stops the gradient there; not done here.)

    The rewards are those of F. The metrics ``fast_loss`` and ``slow_loss`` (the brackets),
    ``fast_dpo`` and ``slow_dpo`` are means. Other arguments and errors are those of :func:`dpo`.

    Args:
        policy_chosen: [B] summed log-probs under the fast adapter F.
        policy_rejected: [B] likewise.
        slow_chosen: [B] the same under the slow adapter S, which is trained as well.
        slow_rejected: [B] likewise.
        alpha: weight of the chase, >= 0; 0 is two independent DPO runs. The paper's is not known.

    Example:
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2, -2.6, -2.6)]
        >>> out = ofs_dpo(*sums, alpha=0.1, beta=0.5)
        >>> round(out.metrics["fast_loss"].item(), 4), round(out.metrics["slow_loss"].item(), 4)
        (0.5978, 0.5115)

    Experimental: the formula was read in a port to diffusion that cites the paper.
    """
    check_tensors("losses.ofs_dpo", slow_chosen=slow_chosen, slow_rejected=slow_rejected)
    check_not_negative("ofs_dpo", "alpha", alpha)
    fast = log_ratios(
        "ofs_dpo", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    slow = log_ratios(
        "ofs_dpo", slow_chosen, slow_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    names = "policy_chosen", "policy_rejected", "slow_chosen", "slow_rejected"
    values = prepare("ofs_dpo", **dict(zip(names, (*fast, *slow), strict=True)))
    chosen_B, rejected_B, slow_chosen_B, slow_rejected_B = (beta * x for x in values)
    fast_B, slow_B = chosen_B - rejected_B, slow_chosen_B - slow_rejected_B
    fast_dpo_B, slow_dpo_B = soft_logistic(fast_B), soft_logistic(slow_B)
    fast_loss_B = fast_dpo_B + alpha * soft_logistic(fast_B - slow_B.detach())
    slow_loss_B = slow_dpo_B - alpha * soft_logistic(fast_B.detach() - slow_B)
    metrics = {
        "fast_loss": fast_loss_B,
        "slow_loss": slow_loss_B,
        "fast_dpo": fast_dpo_B,
        "slow_dpo": slow_dpo_B,
    }
    means = {name: reduce(value_B, "mean") for name, value_B in metrics.items()}
    return pair_output(fast_loss_B + slow_loss_B, chosen_B, rejected_B, reduction, **means)
