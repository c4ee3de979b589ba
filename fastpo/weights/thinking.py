"""Masks of responses with marked thinking, after the code of PRefLexOR (arXiv:2410.12375)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastpo.weights._common import check_like, check_masks, check_range, uniform


def _next(flags_BT: Tensor) -> Tensor:
    """[B, T] the column of the next True behind each column; T where there is none."""
    width = flags_BT.shape[1]
    columns_BT = torch.where(flags_BT, torch.arange(width, device=flags_BT.device), width)
    here_BT = columns_BT.flip(1).cummin(1).values.flip(1)
    return pad(here_BT[:, 1:], (0, min(width, 1)), value=width)


def thinking_masks(
    tokens: Tensor,
    mask: Tensor,
    start_id: int,
    end_id: int,
    share: float = 1.0,
    keep_markers: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The response without its thinking, or without a random share of it.

    A block runs from the nearest start marker before an end marker to that end (the authors' code):
    with nested markers the inner start counts and the outer one is left alone, a further end
    extends the block, an end without a start and a start without an end are ordinary tokens. Of
    each block floor(share * length) tokens are dropped. Where several ends share a start, the code
    draws once for each of these blocks, here the longest is drawn from; at a share of 1 that is the
    same.

    Args:
        tokens: [B, T] token ids.
        mask: [B, T] bool, True at the tokens of the responses; markers elsewhere are not seen.
        start_id: the token that opens a block.
        end_id: the token that closes it.
        share: share of a block's tokens to drop, in [0, 1].
        keep_markers: keep a block's first and last token, the markers, in the result.
        generator: of the draw if ``share`` is below 1; torch's own if None.

    Returns:
        Mask [B, T], part of ``mask``.

    Raises:
        ValueError: shapes do not fit, or the share is out of range.

    Example:
        >>> tokens = torch.tensor([[1, 8, 2, 3, 9, 4]])  # 8 opens, 9 closes
        >>> thinking_masks(tokens, torch.ones(1, 6).bool(), 8, 9).int()
        tensor([[1, 0, 0, 0, 0, 1]], dtype=torch.int32)
        >>> thinking_masks(tokens, torch.ones(1, 6).bool(), 8, 9, keep_markers=True).int()
        tensor([[1, 1, 0, 0, 1, 1]], dtype=torch.int32)
    """
    check_masks("thinking_masks", mask=mask)
    check_like("thinking_masks", "tokens", tokens, "mask", mask)
    check_range("thinking_masks", "share", share, 0, 1, "1 drops all thinking, 0 nothing.")
    opens_BT, closes_BT = mask & (tokens == start_id), mask & (tokens == end_id)
    block_BT = opens_BT.cumsum(1)  # the number of the block, 0 before the first
    next_start_BT = _next(opens_BT)
    will_end_BT = _next(closes_BT) < next_start_BT
    inside_BT = mask & (block_BT > 0) & ~opens_BT & will_end_BT
    if not keep_markers:
        inside_BT = inside_BT | (opens_BT & will_end_BT) | (closes_BT & (block_BT > 0))
    if share == 1 or mask.shape[1] == 0:
        return mask & ~inside_BT
    # Ranks of random numbers within each block: all ranks, minus the tokens of earlier blocks.
    draw_BT = uniform(mask.shape, mask.device, generator).double() + block_BT
    ranks_BT = draw_BT.masked_fill(~inside_BT, torch.inf).argsort(1).argsort(1)
    before_BU = pad(inside_BT.cumsum(1), (1, 0))
    column_T = torch.arange(mask.shape[1], device=mask.device)
    start_BT = torch.where(opens_BT, column_T, 0).cummax(1).values
    earlier_BT = before_BU.gather(1, start_BT)
    size_BT = before_BU.gather(1, next_start_BT) - earlier_BT
    count_BT = (size_BT * share + 1e-9).long()  # 10 * 0.7 is 7, not 6.999
    return mask & ~(inside_BT & (ranks_BT - earlier_BT < count_BT))


def answer_masks(tokens: Tensor, mask: Tensor, end_id: int) -> Tensor:
    """The response from its last end-of-thinking marker on; all of it if there is none.

    Everything before the marker is left out, the marker itself stays.

    Args:
        tokens: [B, T] token ids.
        mask: [B, T] bool, True at the tokens of the responses; markers elsewhere are not seen.
        end_id: the token that closes thinking.

    Returns:
        Mask [B, T], part of ``mask``.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> answer_masks(torch.tensor([[8, 2, 9, 4]]), torch.ones(1, 4).bool(), 9).int()
        tensor([[0, 0, 1, 1]], dtype=torch.int32)
    """
    check_masks("answer_masks", mask=mask)
    check_like("answer_masks", "tokens", tokens, "mask", mask)
    return mask & (_next(mask & (tokens == end_id)) == mask.shape[1])
