"""From losses of sequences to one number: what is averaged, and over which ranks and batches.

Let l_i be the sum over the tokens of sequence i, n_i their number, B the sequences of this call, W
the ranks (``world_size``) and S the calls that add up to one optimiser step
(``accumulation_steps``). Gradients are taken to be averaged over ranks and added over calls, as DDP
and FSDP do.

| aggregation | loss | TRL | verl |
|---|---|---|---|
| token_mean | sum l_i W / num_tokens; local without it | dapo, cispo, vespo | token-mean |
| local_token_mean | sum l_i / sum n_i / S | bnpo | |
| sequence_mean | sum (l_i / n_i) / B / S | grpo, sapo | |
| sequence_mean_nonempty | the same over sequences with n_i > 0 | | seq-mean-token-mean |
| sequence_sum | sum l_i / B / S | luspo | |
| sequence_sum_nonempty | the same over sequences with n_i > 0 | | seq-mean-token-sum |
| fixed_length | sum l_i / (B max_length) / S | dr_grpo | |
| fixed_sum | sum l_i / max_length / S | | seq-mean-token-sum-norm |

With ``num_sequences``, those of all ranks and calls of a step, the means over sequences and
fixed_length divide by it and multiply by W, in place of B and S: the result then does not depend on
how a step is split.
No divisor is below 1, so that batches without tokens give 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.checks import check_tensors
from fastpo.ops._check import fail

AGGREGATIONS = (
    "token_mean",
    "local_token_mean",
    "sequence_mean",
    "sequence_mean_nonempty",
    "sequence_sum",
    "sequence_sum_nonempty",
    "fixed_length",
    "fixed_sum",
)
Count = int | float | Tensor


def _check_count(function: str, name: str, count: Count | None, device: torch.device) -> None:
    if isinstance(count, Tensor):
        if count.ndim != 0 or count.device != device:
            expected, got = f"0-d on {device}", f"{list(count.shape)} on {count.device}"
            raise fail(function, name, expected, got, "Pass a number, or sum and move the tensor.")
    elif count is not None and not 0 <= count < float("inf"):
        raise fail(
            function, name, "a finite number >= 0", repr(count), "Count over the whole step."
        )


def check_aggregation(
    function: str,
    aggregation: str,
    *,
    num_tokens: Count | None,
    num_sequences: Count | None,
    max_length: int | None,
    accumulation_steps: int,
    world_size: int,
    device: torch.device,
) -> None:
    """What :func:`aggregate` needs is there and in range."""
    if aggregation not in AGGREGATIONS:
        expected = f"one of {', '.join(AGGREGATIONS)}"
        raise fail(function, "aggregation", expected, repr(aggregation), "Pick one of them.")
    if aggregation.startswith("fixed") and max_length is None:
        remedy = "Pass the longest response that is generated."
        raise fail(function, "max_length", f"a length for {aggregation}", "None", remedy)
    counts = {
        "max_length": max_length,
        "accumulation_steps": accumulation_steps,
        "world_size": world_size,
    }
    for name, count in counts.items():
        if count is not None and not 1 <= count < float("inf"):
            expected = "a finite number of at least 1"
            raise fail(function, name, expected, repr(count), "Leave it out for 1 or none.")
    _check_count(function, "num_tokens", num_tokens, device)
    _check_count(function, "num_sequences", num_sequences, device)


def _at_least_one(count: Count) -> Count:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def aggregate(
    loss_B: Tensor,
    tokens_B: Tensor,
    aggregation: str,
    *,
    num_tokens: Count | None = None,
    num_sequences: Count | None = None,
    max_length: int | None = None,
    accumulation_steps: int = 1,
    world_size: int = 1,
) -> Tensor:
    """Sums over the tokens of sequences to one loss; the table is at the top of this module.

    Args:
        loss_B: [B] sum of the losses of each sequence's tokens.
        tokens_B: [B] number of these tokens, any dtype.
        aggregation: one of ``AGGREGATIONS``.
        num_tokens: tokens of all ranks and calls of an optimiser step, for ``token_mean``; a number
            or a 0-d tensor.
        num_sequences: sequences of all ranks and calls of a step, for the means over sequences;
            those with tokens for ``..._nonempty``.
        max_length: for ``fixed_length`` and ``fixed_sum``.
        accumulation_steps: calls per step.
        world_size: ranks.

    Returns:
        The loss, 0-d, in the dtype of ``loss_B``.

    Raises:
        ValueError: the aggregation is not known, or lacks what it needs, or shapes do not fit.

    Example:
        >>> aggregate(torch.tensor([6.0, 1.0]), torch.tensor([3, 1]), "token_mean")
        tensor(1.7500)
        >>> aggregate(torch.tensor([6.0, 1.0]), torch.tensor([3, 1]), "sequence_mean")
        tensor(1.5000)
    """
    check_tensors("surrogates.aggregate", loss_B=loss_B, tokens_B=tokens_B)
    check_aggregation(
        "surrogates.aggregate",
        aggregation,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        max_length=max_length,
        accumulation_steps=accumulation_steps,
        world_size=world_size,
        device=loss_B.device,
    )
    if tokens_B.shape != loss_B.shape:
        expected, got = f"{list(loss_B.shape)}, that of the losses", f"{list(tokens_B.shape)}"
        raise fail("surrogates.aggregate", "tokens_B", expected, got, "One number per sequence.")
    if aggregation.startswith("sequence_mean"):
        loss_B = loss_B / tokens_B.clamp(min=1)
    elif aggregation == "fixed_length":
        loss_B = loss_B / max_length
    total = loss_B.sum()
    rows = max(loss_B.shape[0], 1)
    if aggregation == "token_mean" and num_tokens is not None:
        return total * world_size / _at_least_one(num_tokens)
    is_mean = aggregation.startswith("sequence") or aggregation == "fixed_length"
    if is_mean and num_sequences is not None:
        return total * world_size / _at_least_one(num_sequences)
    if aggregation.endswith("token_mean"):
        divisor = tokens_B.sum().clamp(min=1)
    elif aggregation.endswith("nonempty"):
        divisor = (tokens_B > 0).sum().clamp(min=1)
    elif aggregation == "fixed_sum":
        divisor = max_length
    else:
        divisor = rows
    return total / divisor / accumulation_steps
