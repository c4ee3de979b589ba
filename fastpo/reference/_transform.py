"""Logits to z and back, shared by the reference kernels."""

from __future__ import annotations

import torch

from fastpo.tiles import Tile, accumulation_dtype


def scaled_logits(tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """Z [n, v] in the accumulation dtype, and the soft-cap's derivative (ones without one)."""
    raw_nv = tile.logits_nv.to(accumulation_dtype(tile.logits_nv.dtype))
    if tile.bias_v is not None:
        raw_nv = raw_nv + tile.bias_v
    raw_nv = raw_nv * tile.scale
    if tile.softcap == 0.0:
        return raw_nv / tile.temperature, torch.ones_like(raw_nv)
    tanh_nv = torch.tanh(raw_nv / tile.softcap)
    return tile.softcap * tanh_nv / tile.temperature, 1 - tanh_nv * tanh_nv


def is_target(tile: Tile) -> torch.Tensor:
    """[n, v] bool: the column is the row's target."""
    columns_v = torch.arange(tile.logits_nv.shape[1], device=tile.logits_nv.device)
    return columns_v + tile.vocab_start == tile.targets_n[:, None]


def active(tile: Tile) -> torch.Tensor:
    """[n] bool: the row is not ignored."""
    return tile.targets_n != tile.ignore_index
