"""Checks and differences that the losses of errors share."""

from __future__ import annotations

import math

from torch import Tensor

from fastpo.losses._common import REDUCTIONS, Reduction, check_choice, check_inputs, fail, prepare


def check_scale(loss: str, argument: str, value: float) -> None:
    """A positive finite factor; sizes differ too much between methods to name common ones."""
    if not 0 < value < math.inf:
        remedy = "Leave it out for the default."
        raise fail(loss, argument, "a positive finite number", repr(value), remedy)


def prepare_errors(
    loss: str,
    dims: str = "[B]",
    remedy: str = "Reduce predictions with fastpo.diffusion.noise_errors.",
    **errors: Tensor,
) -> list[Tensor]:
    """Check errors, or what goes with them, of one shape; bring them to one dtype, >= float32.

    ``dims`` is ``[B]``, or tells both dimensions of errors that are kept per segment or pair;
    ``remedy`` is for other numbers of dimensions.
    """
    check_inputs(loss, **errors)
    ndim = dims.count(",") + 1
    shape = next(iter(errors.values())).shape
    for name, error in errors.items():
        got = f"{list(error.shape)}"
        if error.ndim != ndim:
            raise fail(loss, name, dims, got, remedy)
        if error.shape != shape:
            expected = f"shape {list(shape)} as {next(iter(errors))}"
            same = "Give the values of the same samples, in the same order, in every argument."
            raise fail(loss, name, expected, got, same)
    flat = prepare(loss, **{name: error.reshape(-1) for name, error in errors.items()})
    return [error.reshape(shape) for error in flat]


def error_gains(
    loss: str,
    chosen_errors: Tensor,
    rejected_errors: Tensor,
    ref_chosen_errors: Tensor,
    ref_rejected_errors: Tensor,
    weights: Tensor | None,
    reduction: Reduction,
    dims: str = "[B]",
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Reference minus policy of each, the implicit log-ratios, and the weights; 1 for none."""
    check_choice(loss, "reduction", reduction, REDUCTIONS)
    chosen, rejected, ref_chosen, ref_rejected = prepare_errors(
        loss,
        dims,
        chosen_errors=chosen_errors,
        rejected_errors=rejected_errors,
        ref_chosen_errors=ref_chosen_errors,
        ref_rejected_errors=ref_rejected_errors,
    )
    gains = ref_chosen.detach() - chosen, ref_rejected.detach() - rejected
    return *gains, 1.0 if weights is None else pair_weights(loss, weights, chosen)


def pair_weights(loss: str, weights: Tensor, like: Tensor) -> Tensor:
    """Weights [B] as constants in the dtype of the errors."""
    check_inputs(loss, weights=weights)
    if weights.shape != like.shape[:1] or weights.device != like.device:
        expected = f"[{like.shape[0]}] on {like.device}"
        got = f"{list(weights.shape)} on {weights.device}"
        raise fail(loss, "weights", expected, got, "Give one weight per pair.")
    return weights.detach().to(like.dtype)
