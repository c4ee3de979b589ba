"""Reference of ``finish_stats``: running row state to log-prob, lse, entropy and the rest."""

from __future__ import annotations

import torch

from fastpo.tiles import RowState


def finish_stats(
    state: RowState,
    targets_n: torch.Tensor,
    *,
    vocab: int,
    ignore_index: int = -100,
    rows: torch.Tensor | None = None,
    logprobs: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    lse_low: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    log_sum_sq_probs: torch.Tensor | None = None,
    mean_logits: torch.Tensor | None = None,
    is_top1: torch.Tensor | None = None,
) -> None:
    """Write each given output at ``rows`` (or 0 .. n); rows with an ignored target get zeros."""
    max_n, sum_n, target_n, sum_exp_logit_n, sum_sq_n, sum_logits_n = state.values_Sn
    margin_n = target_n - max_n - torch.log(sum_n)
    margin_n = torch.where(target_n == torch.inf, torch.nan, margin_n)
    logprob_n = -_softplus(-margin_n)
    log_other_n = -_softplus(margin_n)  # log(1 - p_target)
    alone_n = sum_n == 0  # no probability besides the target's

    def write(out: torch.Tensor | None, value_n: torch.Tensor) -> None:
        if out is not None:
            value_n = torch.where(targets_n == ignore_index, 0, value_n)
            out[slice(None) if rows is None else rows] = value_n.to(out.dtype)

    write(logprobs, logprob_n)
    high_n = torch.maximum(target_n, max_n)
    rest_n = torch.where(alone_n, 0.0, sum_n * torch.exp(max_n - high_n))
    log_sum_n = torch.log(rest_n + torch.exp(target_n - high_n))
    lse_n = high_n + log_sum_n
    write(lse, lse_n)
    write(lse_low, log_sum_n - (lse_n - high_n))
    if entropy is not None:
        other_n = torch.where(
            alone_n, 0.0, torch.log(sum_n) - sum_exp_logit_n / sum_n - log_other_n
        )
        at_target_n = torch.where(logprob_n == -torch.inf, 0.0, -logprob_n.exp() * logprob_n)
        off_target_n = torch.where(log_other_n == -torch.inf, 0.0, log_other_n.exp() * other_n)
        write(entropy, at_target_n + off_target_n)
    if log_sum_sq_probs is not None:
        others_n = 2 * log_other_n + torch.log(sum_sq_n) - 2 * torch.log(sum_n)
        others_n = torch.where(alone_n, -torch.inf, others_n)
        write(log_sum_sq_probs, torch.logaddexp(2 * logprob_n, others_n))
    write(mean_logits, sum_logits_n / vocab)
    write(is_top1, (target_n > max_n) | ((target_n == max_n) & (targets_n < state.top_n)))


def _softplus(x_n: torch.Tensor) -> torch.Tensor:
    """log(1 + e^x) without the linear shortcut that torch's own takes for large x."""
    return x_n.clamp(min=0) + torch.log1p(torch.exp(-x_n.abs()))
