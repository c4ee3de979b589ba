"""What losses over whole groups share: checks, shares of a mean over the batch, a KL beside it."""

from __future__ import annotations

from torch import Tensor

from fastpo.losses._common import check_inputs, check_not_negative, fail
from fastpo.losses._lists import prepare_lists


def prepare_groups(loss: str, mask: Tensor | None, **statistics: Tensor) -> list[Tensor]:
    """:func:`prepare_lists` of [P, G]: checked, of one dtype, 0 at padding; the mask comes last."""
    check_inputs(loss, {"mask": mask}, **statistics)
    for name, tensor in statistics.items():
        if tensor.ndim != 2 or tensor.shape[1] == 0:
            remedy = "Give the G responses of each of P prompts; pad short groups and pass a mask."
            got = f"{list(tensor.shape)}"
            raise fail(loss, name, "one value per response, [P, G]", got, remedy)
    return prepare_lists(loss, mask, **statistics)


def check_kl(loss: str, kl: Tensor | None, kl_weight: float) -> None:
    """A mean over the batch, and a weight of at least zero."""
    check_not_negative(loss, "kl_weight", kl_weight)
    check_inputs(loss, {"kl": kl})
    if kl is not None and (kl.ndim or not kl.is_floating_point()):
        got, remedy = f"{kl.dtype} {list(kl.shape)}", "Take its mean over the tokens of the batch."
        raise fail(loss, "kl", "one real number, 0-d", got, remedy)


def batch_mean_terms(sums_P: Tensor, counts_P: Tensor) -> Tensor:
    """[P] terms whose mean is the sum of all sums over the sum of all counts; 0 if that is 0."""
    return sums_P * sums_P.shape[0] / counts_P.sum().clamp(min=1)
