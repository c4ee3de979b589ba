"""What losses over lists of responses share: checks, masked statistics, list cross-entropies."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.losses._common import check_inputs, fail, prepare


def prepare_lists(loss: str, mask: Tensor | None, **statistics: Tensor) -> list[Tensor]:
    """Check statistics [B, K] and bring them to one dtype; the last of the result is the mask.

    Padding is set to 0, so that nothing there, not even NaN, reaches a loss or a gradient.
    """
    check_inputs(loss, {"mask": mask}, **statistics)
    first = next(iter(statistics))
    shape = statistics[first].shape
    for name, tensor in statistics.items():
        if tensor.ndim != 2 or tensor.shape[1] == 0:
            remedy = "Give K responses for each of B prompts; pad short lists and pass a mask."
            raise fail(
                loss, name, "one value per response, [B, K]", f"{list(tensor.shape)}", remedy
            )
        if tensor.shape != shape:
            expected = f"shape {list(shape)} as {first}"
            remedy = "Give one value per response in every argument, in the same order."
            raise fail(loss, name, expected, f"{list(tensor.shape)}", remedy)
    if mask is None:
        mask = torch.ones_like(statistics[first], dtype=torch.bool)
    elif mask.dtype != torch.bool or mask.shape != shape:
        remedy = "True where there is a response, False for padding."
        got = f"{mask.dtype} {list(mask.shape)}"
        raise fail(loss, "mask", f"torch.bool {list(shape)}", got, remedy)
    flat = prepare(loss, **{name: tensor.flatten() for name, tensor in statistics.items()})
    return [torch.where(mask, x.view(shape), 0) for x in flat] + [mask]


def best_first(scores_BK: Tensor, mask_BK: Tensor, *values_BK: Tensor) -> list[Tensor]:
    """Values, scores and mask by falling scores; ties keep their order, padding comes last."""
    order_BK = scores_BK.masked_fill(~mask_BK, -torch.inf).argsort(
        dim=1, descending=True, stable=True
    )
    return [x.gather(1, order_BK) for x in (*values_BK, scores_BK, mask_BK)]


def suffix_cross_entropy(own_BK: Tensor, others_BKK: Tensor, mask_BK: Tensor) -> Tensor:
    """[B] sums over i of logsumexp(own_i, others_ij of all j after i) - own_i.

    ``own`` must be finite at padding as well. Responses after which none comes add 0.
    """
    size = own_BK.shape[1]
    after_KK = torch.ones(size, size, dtype=torch.bool, device=own_BK.device).triu(1)
    valid_BKK = after_KK & mask_BK[:, None, :] & mask_BK[:, :, None]
    rest_BKK = others_BKK.masked_fill(~valid_BKK, -torch.inf)
    all_BKL = torch.cat((own_BK[:, :, None], rest_BKK), dim=2)
    return (all_BKL.logsumexp(2) - own_BK).sum(1)


def masked_mean(values_BK: Tensor, mask_BK: Tensor) -> Tensor:
    """[B] means over the responses of a list; 0 for an empty list. Padding must be 0."""
    return values_BK.sum(1) / mask_BK.sum(1).clamp(min=1)
