"""What every loss shares: result types, input checks, reductions and parts of formulas."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastpo.bounds import hold
from fastpo.checks import check_tensors

Reduction = Literal["mean", "sum", "none"]
NllMean = Literal["token_mean", "sequence_mean"]

REDUCTIONS = ("mean", "sum", "none")
NLL_MEANS = ("token_mean", "sequence_mean")

# exp of more is held there: finite, and with room for a factor and a sum over a batch.
LARGEST_EXPONENT = {torch.float32: 80.0, torch.float64: 700.0}


class LossOutput(NamedTuple):
    """Result of a loss over pairs.

    Attributes:
        loss: 0-d, or [B] with ``reduction="none"``; float32, or float64 for float64 inputs.
        chosen_rewards: [B] implicit rewards of the chosen responses, detached.
        rejected_rewards: [B] implicit rewards of the rejected responses, detached.
        metrics: what else the loss has to tell, by name, detached; often empty.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    metrics: dict[str, Tensor]


class UnpairedOutput(NamedTuple):
    """Result of a loss over single labelled responses.

    Attributes:
        loss: 0-d, or [B] with ``reduction="none"``; float32, or float64 for float64 inputs.
        rewards: [B] implicit rewards, detached.
        metrics: what else the loss has to tell, by name, detached; often empty.
    """

    loss: Tensor
    rewards: Tensor
    metrics: dict[str, Tensor]


def fail(loss: str, argument: str, expected: str, got: str, remedy: str) -> ValueError:
    """The error of every check: what was expected, what came and what to do.

    ``loss`` is a name in ``fastpo.losses``, or a dotted one of another package.
    """
    place = loss if "." in loss else f"losses.{loss}"
    return ValueError(f"fastpo.{place}: {argument}: expected {expected}, got {got}. {remedy}")


def check_inputs(
    loss: str, optional: dict[str, Tensor | None] | None = None, /, **required: Tensor
) -> None:
    """Each is a tensor; the optional ones may be None."""
    check_tensors(loss if "." in loss else f"losses.{loss}", optional, **required)


def prepare(loss: str, **statistics: Tensor) -> list[Tensor]:
    """Check per-sequence statistics [B] and bring them to one dtype.

    All must have one shape and one device. Floats narrower than float32 are computed in float32;
    integer tensors (token counts) take the dtype of the others.
    """
    check_inputs(loss, **statistics)
    first = next(iter(statistics))
    shape, device = statistics[first].shape, statistics[first].device
    dtype = torch.float32
    for name, tensor in statistics.items():
        if tensor.ndim != 1:
            remedy = "Reduce token values first, for example with fastpo.sequence_sums."
            raise fail(loss, name, "one value per sequence, [B]", f"{list(tensor.shape)}", remedy)
        if tensor.shape != shape:
            expected = f"shape {list(shape)} as {first}"
            remedy = "Give one value per sequence in every argument, in the same order."
            raise fail(loss, name, expected, f"{list(tensor.shape)}", remedy)
        if tensor.device != device:
            remedy = "Move it with .to(device)."
            raise fail(loss, name, f"device {device} as {first}", f"{tensor.device}", remedy)
        if tensor.dtype == torch.bool or tensor.is_complex():
            remedy = "Cast it with .to(torch.float32)."
            raise fail(loss, name, "real numbers", f"{tensor.dtype}", remedy)
        if tensor.is_floating_point():
            dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in statistics.values()]


def check_choice(loss: str, argument: str, value: str, choices: tuple[str, ...]) -> None:
    """``value`` is one of ``choices``."""
    if value not in choices:
        raise fail(loss, argument, f"one of {', '.join(choices)}", repr(value), "Pick one of them.")


def check_positive(loss: str, argument: str, value: float) -> None:
    """A positive finite number."""
    if not 0 < value < math.inf:
        remedy = "Common values lie between 0.01 and 10."
        raise fail(loss, argument, "a positive finite number", repr(value), remedy)


def check_not_negative(loss: str, argument: str, value: float) -> None:
    """A finite number that is at least zero."""
    if not 0 <= value < math.inf:
        raise fail(loss, argument, "a finite number >= 0", repr(value), "0 switches the term off.")


def check_finite(loss: str, argument: str, value: float) -> None:
    """A finite number."""
    if not math.isfinite(value):
        raise fail(loss, argument, "a finite number", repr(value), "0 switches it off.")


def check_share(loss: str, argument: str, value: float) -> None:
    """A number in [0, 1]."""
    if not 0 <= value <= 1:
        remedy = "It is a share between two terms."
        raise fail(loss, argument, "a number in [0, 1]", repr(value), remedy)


def check_flags(loss: str, argument: str, flags: Tensor, like: Tensor) -> None:
    """A bool for each value of ``like``."""
    check_inputs(loss, **{argument: flags})
    if flags.dtype != torch.bool or flags.shape != like.shape:
        got = f"{flags.dtype} {list(flags.shape)}"
        remedy = "Compare with 0 to get bool, in the order of the other arguments."
        raise fail(loss, argument, f"torch.bool {list(like.shape)}", got, remedy)


def check_label_smoothing(loss: str, value: float) -> None:
    """A share of flipped labels, below one half: from there on the pair says nothing."""
    if not 0 <= value < 0.5:
        remedy = "It is the assumed share of flipped labels; 0 switches it off."
        raise fail(loss, "label_smoothing", "a number in [0, 0.5)", repr(value), remedy)


def reduce(loss_B: Tensor, reduction: Reduction, among_B: Tensor | None = None) -> Tensor:
    """Reduce [B]; the mean of an empty batch is 0, with zero gradient.

    Where ``among_B`` is False an entry is 0 and does not count in the mean.
    """
    count = max(loss_B.shape[0], 1)
    if among_B is not None:
        loss_B, count = torch.where(among_B, loss_B, 0.0), among_B.sum().clamp(min=1)
    if reduction == "none":
        return loss_B
    total = loss_B.sum()
    return total if reduction == "sum" else total / count


def detached(value: Tensor) -> Tensor:
    """A copy without gradient, which users may write into: backward may need the original."""
    return value.detach().clone()


def pair_output(
    loss_B: Tensor,
    chosen_rewards_B: Tensor,
    rejected_rewards_B: Tensor,
    reduction: Reduction,
    among_B: Tensor | None = None,
    **metrics: Tensor,
) -> LossOutput:
    """The result of a loss over pairs, all or those marked; all but the loss is detached."""
    rewards = detached(chosen_rewards_B), detached(rejected_rewards_B)
    metrics = {name: detached(value) for name, value in metrics.items()}
    return LossOutput(reduce(loss_B, reduction, among_B), *rewards, metrics)


def unpaired_output(
    loss_B: Tensor,
    rewards_B: Tensor,
    reduction: Reduction,
    among_B: Tensor | None = None,
    **metrics: Tensor,
) -> UnpairedOutput:
    """The result of a loss over responses, all or those marked; all but the loss is detached."""
    metrics = {name: detached(value) for name, value in metrics.items()}
    return UnpairedOutput(reduce(loss_B, reduction, among_B), detached(rewards_B), metrics)


def log_ratios(
    loss: str,
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    reduction: Reduction,
) -> tuple[Tensor, Tensor]:
    """Checks that the losses with a reference share, then policy minus reference of each [B]."""
    check_positive(loss, "beta", beta)
    check_choice(loss, "reduction", reduction, REDUCTIONS)
    policy_chosen_B, policy_rejected_B, ref_chosen_B, ref_rejected_B = prepare(
        loss,
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
    )
    return policy_chosen_B - ref_chosen_B.detach(), policy_rejected_B - ref_rejected_B.detach()


def mean_logprobs(sums_B: Tensor, counts_B: Tensor) -> Tensor:
    """Sums over sequences divided by their token counts; an empty sequence gives 0."""
    return sums_B / counts_B.clamp(min=1)


def log1mexp(mean_B: Tensor) -> Tensor:
    """log(1 - p) of p = exp(m), m <= 0, finite with a finite gradient up to p = 1.

    Taken by the form that keeps its digits on each side of p = 1/2, and with 1 - p held at the
    machine epsilon or above: at p = 1 it is -15.9 (float32), not infinite.
    """
    guarded_B = hold(mean_B, high=-torch.finfo(mean_B.dtype).eps)
    half = -math.log(2)
    near_one_B = torch.log(-torch.expm1(guarded_B))
    # torch.where differentiates both branches: keep this one away from 1 - p = 0, where an exp that
    # rounds up to 1 would make its gradient infinite and the sum NaN.
    near_zero_B = torch.log1p(-torch.exp(hold(guarded_B, high=half)))
    return torch.where(guarded_B > half, near_one_B, near_zero_B)


def log_odds(mean_B: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(m), m <= 0, finite with a finite gradient up to p = 1."""
    return mean_B - log1mexp(mean_B)


def negative_log_likelihood(sums_B: Tensor, counts_B: Tensor, mean: NllMean) -> Tensor:
    """[B] terms whose mean is the negative log-likelihood per token.

    ``token_mean`` weighs every token of the batch alike, ``sequence_mean`` every sequence.
    """
    if mean == "sequence_mean":
        return -mean_logprobs(sums_B, counts_B)
    return -sums_B * (sums_B.shape[0] / counts_B.sum().clamp(min=1))
