"""Input checks of the pure functions of this package, and the order of scores they share."""

from __future__ import annotations

import torch
from torch import Tensor


def fail(function: str, argument: str, expected: str, got: str, remedy: str) -> ValueError:
    """The error of every check: what was expected, what came and what to do."""
    return ValueError(
        f"fastpo.data.{function}: {argument}: expected {expected}, got {got}. {remedy}"
    )


def floats(values: Tensor) -> Tensor:
    """Float32, or float64 for float64 and integers, whose differences and ties stay exact."""
    exact = not values.is_floating_point() or values.dtype == torch.float64
    return values.detach().to(torch.float64 if exact else torch.float32)


def real(function: str, argument: str, values: Tensor, dims: str) -> Tensor:
    """``values`` by :func:`floats`, with the dimensions ``dims``, such as "B K"."""
    names = dims.split()
    if values.ndim != len(names):
        remedy = "Reshape it; one row per prompt comes first."
        raise fail(function, argument, f"[{', '.join(names)}]", f"{list(values.shape)}", remedy)
    if values.is_complex():
        raise fail(function, argument, "real numbers", f"{values.dtype}", "Take the real part.")
    return floats(values)


def scores_of(function: str, scores: Tensor, argument: str = "scores") -> Tensor:
    """Scores [B, K] with K of at least 1, by :func:`real`."""
    scores_BK = real(function, argument, scores, "B K")
    if scores_BK.shape[1] == 0:
        remedy = "A prompt without any response has no place in the batch."
        raise fail(function, argument, "K >= 1 responses", f"{list(scores.shape)}", remedy)
    return scores_BK


def bools(function: str, argument: str, values: Tensor, shape: torch.Size) -> Tensor:
    """Truth values of the given shape, or of one that broadcasts to it."""
    try:
        fits = torch.broadcast_shapes(values.shape, shape) == shape
    except RuntimeError:
        fits = False
    if values.dtype != torch.bool or not fits:
        got = f"{values.dtype} {list(values.shape)}"
        raise fail(function, argument, f"bool {list(shape)}", got, "Compare to get truth values.")
    return values.expand(shape)


def same_shape(function: str, **values: Tensor) -> None:
    """All have the shape of the first."""
    first = next(iter(values))
    for name, tensor in values.items():
        if tensor.shape != values[first].shape:
            expected = f"shape {list(values[first].shape)} as {first}"
            remedy = "Give one value per entry, in the same order."
            raise fail(function, name, expected, f"{list(tensor.shape)}", remedy)


def square(function: str, argument: str, values: Tensor) -> None:
    """The last two dimensions are equal."""
    if values.ndim < 2 or values.shape[-1] != values.shape[-2]:
        remedy = "Entry [i, j] is the probability that i beats j."
        raise fail(function, argument, "[..., K, K]", f"{list(values.shape)}", remedy)


def choice(function: str, argument: str, value: str, choices: tuple[str, ...]) -> None:
    """``value`` is one of ``choices``."""
    if value not in choices:
        expected = f"one of {', '.join(choices)}"
        raise fail(function, argument, expected, repr(value), "Pick one of them.")


def share(function: str, argument: str, value: float) -> None:
    """A number in [0, 1]."""
    if not 0 <= value <= 1:
        remedy = "It is a share of the whole; 1 keeps all."
        raise fail(function, argument, "a number in [0, 1]", repr(value), remedy)


def at_least(function: str, argument: str, value: float, least: float) -> None:
    """A number that is ``least`` or more."""
    if not value >= least:
        raise fail(function, argument, f"at least {least}", repr(value), "Give a larger one.")


def first_max(scores_BK: Tensor) -> Tensor:
    """[B] column of the largest score, the first of equal ones; NaN never wins, 0 if all are NaN.

    Not ``argmax`` on filled scores: a real -inf must win over a NaN to its left.
    """
    known_BK = ~scores_BK.isnan()
    filled_BK = scores_BK.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    is_top_BK = known_BK & (filled_BK == filled_BK.amax(-1, keepdim=True))
    return is_top_BK.byte().argmax(-1)


def first_min(scores_BK: Tensor) -> Tensor:
    """[B] column of the smallest score, the first of equal ones; otherwise as `first_max`."""
    return first_max(-scores_BK)


def ranking(scores_BK: Tensor) -> Tensor:
    """[B, K] columns from best to worst; equal scores in the order of columns, NaN at the end."""
    filled_BK = scores_BK.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    order_BK = filled_BK.sort(dim=-1, descending=True, stable=True).indices
    unknown_BK = scores_BK.gather(-1, order_BK).isnan()
    return order_BK.gather(-1, unknown_BK.byte().sort(dim=-1, stable=True).indices)
