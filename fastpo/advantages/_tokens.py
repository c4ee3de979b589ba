"""What tokens of a batch have in common: checks, masks, places, and sums to the end."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.advantages._common import check_rows, check_shapes, fail
from fastpo.checks import check_operands
from fastpo.ops import gae as ops
from fastpo.ops._check import check_offsets


def check_tokens(
    function: str,
    tokens: dict[str, Tensor | None],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    rows: dict[str, Tensor | None] | None = None,
) -> Tensor | None:
    """The offsets as the ops take them, after a check of shapes, dtypes and devices.

    ``tokens`` have the shape [B, T], or [N] with ``cu_seqlens``, and ``rows`` are [B].
    """
    tokens, rows = (
        {name: tensor for name, tensor in (named or {}).items() if tensor is not None}
        for named in (tokens, rows)
    )
    if mask is not None:
        tokens["mask"] = mask
    check_operands(f"advantages.{function}", {"cu_seqlens": cu_seqlens}, **tokens, **rows)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise fail(function, "mask", "torch.bool", mask.dtype, "Call mask.bool().")
    shape = next(iter(tokens.values())).shape
    if cu_seqlens is None:
        check_shapes(function, "B, T", **tokens)
        check_rows(function, shape[0], **rows)
        return None
    check_shapes(function, "N", **tokens)
    offsets = check_offsets(f"advantages.{function}", cu_seqlens, shape[0])
    check_rows(function, offsets.shape[0] - 1, **rows)
    return offsets


def active_tokens(tokens: Tensor, mask: Tensor | None, offsets: Tensor | None) -> Tensor:
    """Bool, the tokens that count."""
    if offsets is None:
        return torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    places_N = torch.arange(tokens.shape[0], device=tokens.device)
    inside_N = (places_N >= offsets[0]) & (places_N < offsets[-1])
    return inside_N if mask is None else inside_N & mask


def per_token(values_B: Tensor, tokens: Tensor, offsets: Tensor | None) -> Tensor:
    """The value of each token's sequence; any value for a packed token in none."""
    if offsets is None:
        return values_B[:, None].expand(tokens.shape)
    places_N = torch.arange(tokens.shape[0], device=tokens.device)
    index_N = torch.searchsorted(offsets[1:], places_N, right=True)
    return torch.cat([values_B, values_B.new_zeros(1)])[index_N]


def last_tokens(active: Tensor, offsets: Tensor | None) -> Tensor:
    """int64 [B], 1 + the place of each sequence's last token that counts; 0 without any."""
    if offsets is None:
        B, T = active.shape
        offsets = torch.arange(B + 1, device=active.device) * T
    active_N = active.reshape(-1)
    places_N = torch.arange(1, active_N.shape[0] + 1, device=active.device)
    seen_N = torch.where(active_N, places_N, 0).cummax(0).values
    last_B = torch.cat([seen_N.new_zeros(1), seen_N])[offsets[1:]]
    return torch.where(last_B > offsets[:-1], last_B, 0)


def discounted_sums(
    rewards: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    gamma: float = 1.0,
    restart: bool = False,
) -> Tensor:
    """Discounted sums from each token to the end."""
    return ops.gae(rewards, None, None, mask, offsets, gamma, 1.0, restart, False)[0]
