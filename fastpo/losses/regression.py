"""Losses over pairs that regress log-ratios to rewards or win rates.

All take summed log-probs per response, in nats, prompt and padding left out. Below, a and b are the
log-ratios (policy minus reference) of chosen and rejected, d = a - b. Neither the reference nor a
score or win rate gets a gradient. Where pairs are not ordered, chosen and rejected are the first
and the second response.

Squares reach 1e5 with published settings: they overflow float16, and are computed in float32.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastpo.checks import check_tensors
from fastpo.inputs import Trained
from fastpo.losses._common import (
    LossOutput,
    Reduction,
    check_choice,
    check_flags,
    check_positive,
    fail,
    log_ratios,
    mean_logprobs,
    pair_output,
    prepare,
)
from fastpo.losses.margins import squared


def rebel(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    eta: float = 1.0,
    reduction: Reduction = "mean",
) -> LossOutput:
    """REBEL: regression of the difference of rewards.

    (d - eta (r_chosen - r_rejected))^2  (arXiv:2404.16767, the authors' code). The reference is the
    policy that wrote the responses, by the log-probs stored with them.

    Args:
        chosen_scores: [B] rewards, raw or whitened.
        rejected_scores: [B] likewise.
        eta: step size, > 0: 1 in the authors' small-batch scripts, 1e6 in the large-batch one,
            whose reward model gives small differences.

    Other arguments and errors are those of :func:`dpo`.

    Returns:
        LossOutput; the rewards are a / eta and b / eta.

    Example:
        >>> out = rebel(*torch.tensor([[-12.0], [-14.5], [-13.0], [-14.0]]), torch.tensor([1.3]),
        ...             torch.tensor([0.4]))
        >>> round(out.loss.item(), 4)
        0.36
    """
    check_positive("rebel", "eta", eta)
    chosen_B, rejected_B = log_ratios(
        "rebel", policy_chosen, policy_rejected, ref_chosen, ref_rejected, 1.0, reduction
    )
    chosen_B, rejected_B, chosen_scores_B, rejected_scores_B = prepare(
        "rebel",
        policy_chosen=chosen_B,
        policy_rejected=rejected_B,
        chosen_scores=chosen_scores,
        rejected_scores=rejected_scores,
    )
    loss_B = squared(chosen_B - rejected_B, eta * (chosen_scores_B - rejected_scores_B))
    return pair_output(loss_B, chosen_B / eta, rejected_B / eta, reduction)


def online_ipo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    label: Tensor,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Online IPO: regression to the preference between two responses of the policy itself.

    (d - (p - 1/2) / beta)^2, p the judge's probability that the first beats the second, both drawn
    from the policy (``online_ipo_2`` in the code of arXiv:2503.08942). p = 1 is IPO on sums.

    Args:
        label: [B] p, in [0, 1].

    Other arguments, result and errors are those of :func:`dpo`.

    Example:
        >>> out = online_ipo(*torch.tensor([[-12.0], [-14.5], [-13.0], [-14.0]]),
        ...                  label=torch.tensor([0.6]))
        >>> round(out.loss.item(), 4)
        0.25
    """
    chosen_B, rejected_B = log_ratios(
        "online_ipo", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    chosen_B, rejected_B, label_B = prepare(
        "online_ipo", policy_chosen=chosen_B, policy_rejected=rejected_B, label=label
    )
    loss_B = squared(chosen_B - rejected_B, (label_B - 0.5) / beta)
    return pair_output(loss_B, beta * chosen_B, beta * rejected_B, reduction)


def egpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_win_rates: Tensor,
    rejected_win_rates: Tensor,
    chosen_counts: Tensor | None = None,
    rejected_counts: Tensor | None = None,
    beta: float = 0.1,
    convention: Literal["summed", "averaged"] = "summed",
    reduction: Reduction = "mean",
) -> LossOutput:
    """Extragradient preference optimisation: regression to win rates against an opponent.

    (d - (p_chosen - p_rejected) / beta)^2, p the probability to beat a third response, drawn from
    the opponent (arXiv:2503.08942; ``online_ipo_1`` in its code). With the policy as its own
    opponent a gradient step is mirror descent. The extragradient step applies this loss's gradient
    at the policy, with the opponent drawn from the policy after a first, undone half step.

    ``averaged`` divides log-probs by token counts, as the authors' language-model code does. For
    its average over prefixes give the values of :func:`prefix_sums`, flattened.

    Args:
        chosen_win_rates: [B] p of the first response, in [0, 1].
        rejected_win_rates: [B] p of the second.
        chosen_counts: [B] tokens; required by ``averaged``, else unused.
        rejected_counts: [B] likewise.
        convention: ``summed`` over the tokens of a response, or ``averaged``.

    Other arguments, result and errors are those of :func:`dpo`; the rewards are beta times the
    log-ratios of the convention.

    Example:
        >>> out = egpo(*torch.tensor([[-12.0], [-14.5], [-13.0], [-14.0]]), torch.tensor([0.7]),
        ...            torch.tensor([0.45]))
        >>> round(out.loss.item(), 4)
        1.0
    """
    check_choice("egpo", "convention", convention, ("summed", "averaged"))
    is_averaged = convention == "averaged"
    if is_averaged and (chosen_counts is None or rejected_counts is None):
        remedy = 'Pass fastpo.sequence_counts(...), or convention="summed".'
        raise fail("egpo", "chosen_counts, rejected_counts", "token counts [B]", "None", remedy)
    chosen_B, rejected_B = log_ratios(
        "egpo", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    values = {"policy_chosen": chosen_B, "policy_rejected": rejected_B}
    values |= {"chosen_win_rates": chosen_win_rates, "rejected_win_rates": rejected_win_rates}
    if is_averaged:
        values |= {"chosen_counts": chosen_counts, "rejected_counts": rejected_counts}
    chosen_B, rejected_B, chosen_win_rates_B, rejected_win_rates_B, *counts = prepare(
        "egpo", **values
    )
    if counts:
        chosen_B = mean_logprobs(chosen_B, counts[0])
        rejected_B = mean_logprobs(rejected_B, counts[1])
    loss_B = squared(chosen_B - rejected_B, (chosen_win_rates_B - rejected_win_rates_B) / beta)
    return pair_output(loss_B, beta * chosen_B, beta * rejected_B, reduction)


def prefix_sums(values: Tensor, mask: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """Sums and token counts of prefixes that end in the second half of each response.

    A response of n tokens is cut after n // 2 + j ceil((n - n // 2) / chunks) tokens, j = 1 ...
    chunks, at most n; the last prefix is the whole. EGPO's code cuts all responses of a batch where
    the longest one is cut (arXiv:2503.08942); here padding changes nothing.

    Args:
        values: [B, T] log-probs of the tokens, in nats.
        mask: [B, T] bool, true for the tokens of the response.
        chunks: number of prefixes C, > 0.

    Returns:
        Sums [B, C], differentiable, and counts [B, C].

    Raises:
        ValueError: shapes do not fit or chunks is not positive.

    Example:
        >>> prefix_sums(-torch.arange(1.0, 6.0)[None], torch.ones(1, 5, dtype=torch.bool), 2)
        (tensor([[-10., -15.]]), tensor([[4, 5]]))
    """
    check_tensors("losses.prefix_sums", values=values)
    if chunks < 1:
        raise fail("prefix_sums", "chunks", "a number > 0", repr(chunks), "1 is the response.")
    if values.ndim != 2:
        remedy = "Give one row per response."
        raise fail("prefix_sums", "values", "[B, T]", f"{list(values.shape)}", remedy)
    check_flags("prefix_sums", "mask", mask, values)
    values_BT = values.to(torch.promote_types(values.dtype, torch.float32))
    values_BT = torch.where(mask, values_BT, 0.0)
    position_BT = mask.cumsum(1)  # 1 at the first token of the response
    count_B1 = mask.sum(1, keepdim=True)
    half_B1 = count_B1 // 2
    step_B1 = (count_B1 - half_B1 + chunks - 1) // chunks
    number_C = torch.arange(1, chunks + 1, device=values.device)
    ends_BC = torch.minimum(half_B1 + step_B1 * number_C, count_B1)
    inside_BCT = position_BT[:, None] <= ends_BC[:, :, None]
    return torch.where(inside_BCT, values_BT[:, None], 0.0).sum(2), ends_BC


def sppo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_win_rates: Tensor,
    rejected_win_rates: Tensor,
    beta: float = 0.001,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Self-play preference optimisation: each log-ratio is regressed to its own win rate.

    [(a - (p_chosen - 1/2) / beta)^2 + (b - (p_rejected - 1/2) / beta)^2] / 2, p the win rate
    against the policy of this iteration, the reference (arXiv:2405.00675; beta = 1 / eta there).
    The 1/2 stands for the log of the normaliser. The half in front is the authors' code's; with
    p = 1 and 0 it is half of ``sppo_hard`` of TRL. Win rates over K samples of the policy count the
    sample itself: :func:`fastpo.data.win_rates.win_rates` with ``include_self``.

    Args:
        chosen_win_rates: [B] p of the chosen response, in [0, 1].
        rejected_win_rates: [B] p of the rejected response.

    Other arguments, result and errors are those of :func:`dpo`.

    Example:
        >>> out = sppo(*torch.tensor([[-12.0], [-14.5], [-13.0], [-14.0]]), torch.tensor([0.8]),
        ...            torch.tensor([0.3]), beta=0.01)
        >>> round(out.loss.item(), 1)
        610.6
    """
    chosen_B, rejected_B = log_ratios(
        "sppo", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    chosen_B, rejected_B, chosen_win_rates_B, rejected_win_rates_B = prepare(
        "sppo",
        policy_chosen=chosen_B,
        policy_rejected=rejected_B,
        chosen_win_rates=chosen_win_rates,
        rejected_win_rates=rejected_win_rates,
    )
    chosen_loss_B = squared(chosen_B, (chosen_win_rates_B - 0.5) / beta)
    rejected_loss_B = squared(rejected_B, (rejected_win_rates_B - 0.5) / beta)
    loss_B = (chosen_loss_B + rejected_loss_B) / 2
    return pair_output(loss_B, beta * chosen_B, beta * rejected_B, reduction)


def sppo_single(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    label: Tensor,
    beta: float = 0.001,
    reduction: Reduction = "mean",
) -> LossOutput:
    """:func:`sppo` with the preference of the one pair in place of win rates.

    [(a - (p - 1/2) / beta)^2 + (b + (p - 1/2) / beta)^2] / 2  (arXiv:2405.00675, authors' code).

    Args:
        label: [B] p, probability that chosen beats rejected.

    Other arguments, result and errors are those of :func:`dpo`.

    Example:
        >>> out = sppo_single(*torch.tensor([[-12.0], [-14.5], [-13.0], [-14.0]]),
        ...                   label=torch.tensor([0.9]), beta=0.01)
        >>> round(out.loss.item(), 1)
        1540.6
    """
    check_tensors("losses.sppo_single", label=label)
    sums = policy_chosen, policy_rejected, ref_chosen, ref_rejected
    return sppo(*sums, label, 1 - label, beta, reduction)
