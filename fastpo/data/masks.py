"""Which tokens of generated text count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpo.data._checks import bools, fail


def _counted_and_ends(
    function: str, tokens: Tensor, eos_ids: int | Sequence[int], mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Bool [B, T]: the token counts; it counts and ends a sequence."""
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        got = f"{tokens.dtype} {list(tokens.shape)}"
        raise fail(function, "tokens", "token ids [B, T]", got, "Pad them to one length.")
    counted_BT = torch.ones_like(tokens, dtype=torch.bool)
    if mask is not None:
        counted_BT = bools(function, "mask", mask, tokens.shape)
    ids = torch.as_tensor(eos_ids, device=tokens.device).reshape(-1)
    return counted_BT, counted_BT & torch.isin(tokens, ids)


def until_first_eos(
    tokens: Tensor, eos_ids: int | Sequence[int], mask: Tensor | None = None
) -> Tensor:
    """The tokens of each response up to and with its first end-of-sequence token.

    What a model writes after it is not part of the response, even where padding has the same id.

    Args:
        tokens: [B, T] token ids.
        eos_ids: the id, or ids, that end a response.
        mask: bool [B, T], True at the responses; end tokens in prompts do not count. All if not
            given.

    Returns:
        Bool [B, T], part of ``mask``; all of ``mask`` in a row without an end.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Example:
        >>> until_first_eos(torch.tensor([[5, 2, 7, 2], [5, 6, 7, 8]]), eos_ids=2).int()
        tensor([[1, 1, 0, 0],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    counted_BT, is_end_BT = _counted_and_ends("until_first_eos", tokens, eos_ids, mask)
    earlier_BT = is_end_BT.cumsum(1) - is_end_BT.long()
    return counted_BT & (earlier_BT == 0)


def has_eos(tokens: Tensor, eos_ids: int | Sequence[int], mask: Tensor | None = None) -> Tensor:
    """Whether each response ends: for :func:`fastpo.data.scores.penalize_missing_eos`.

    Args:
        tokens: as in :func:`until_first_eos`.
        eos_ids: as in :func:`until_first_eos`.
        mask: as in :func:`until_first_eos`.

    Returns:
        Bool [B].

    Raises:
        ValueError: shapes or dtypes do not fit.

    Example:
        >>> has_eos(torch.tensor([[5, 2, 7, 2], [5, 6, 7, 8]]), eos_ids=2)
        tensor([ True, False])
    """
    return _counted_and_ends("has_eos", tokens, eos_ids, mask)[1].any(1)
