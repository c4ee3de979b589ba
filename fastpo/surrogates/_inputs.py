"""Checks and broadcasts that the functions of this package share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.checks import check_operands, fail
from fastpo.operands import replaced
from fastpo.ops._check import check_float, check_offsets
from fastpo.tiles import accumulation_dtype


class Layout(NamedTuple):
    """How tokens lie: rows [B, T], or packed [N] with offsets.

    Attributes:
        shape: of a tensor with a value per token.
        sequences: B.
        offsets: int64 [B + 1], or None for rows.
        dtype: of sums over tokens.
        device: of all tensors.
    """

    shape: tuple[int, ...]
    sequences: int
    offsets: Tensor | None
    dtype: torch.dtype
    device: torch.device

    def widened(self, dtype: torch.dtype) -> Layout:
        """The same tokens with values of another dtype."""
        return replaced(self, dtype=accumulation_dtype(dtype))

    def to_tokens(self, values_B: Tensor) -> Tensor:
        """[B, 1] of rows, or packed [N] with each sequence's value at its tokens."""
        if self.offsets is None:
            return values_B[:, None]
        if not self.sequences:
            return values_B.new_zeros(self.shape)
        return values_B[self.sequence_of_token()]

    def sequence_of_token(self) -> Tensor:
        """Int64 [N]: the sequence of a packed token; positions in none get a neighbour's."""
        places_N = torch.arange(self.shape[0], device=self.device)
        index_N = torch.searchsorted(self.offsets, places_N, right=True) - 1
        return index_N.clamp(0, self.sequences - 1)


def check_tokens(
    function: str,
    name: str,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    **others: Tensor | None,
) -> Layout:
    """Layout of the token values ``name``; ``others`` have to lie on the same device."""
    optional = {"mask": mask, "cu_seqlens": cu_seqlens, **others}
    check_operands(function, optional, **{name: values})
    check_float(function, name, values)
    if values.ndim != (2 if cu_seqlens is None else 1):
        expected = "rows [B, T]" if cu_seqlens is None else "packed [N], as cu_seqlens is given"
        remedy = "Padded rows go without cu_seqlens, packed tokens with it."
        raise fail(function, name, expected, f"{list(values.shape)}", remedy)
    offsets = None
    if cu_seqlens is not None:
        offsets = check_offsets(function, cu_seqlens, values.shape[0])
    B = values.shape[0] if offsets is None else offsets.shape[0] - 1
    dtype = accumulation_dtype(values.dtype)
    layout = Layout(tuple(values.shape), B, offsets, dtype, values.device)
    check_flags(function, "mask", mask, layout)
    return layout


def check_flags(function: str, name: str, flags: Tensor | None, layout: Layout) -> None:
    """A bool per token, if given."""
    check_operands(function, {name: flags})
    if flags is not None and (flags.dtype != torch.bool or tuple(flags.shape) != layout.shape):
        expected, got = f"torch.bool {list(layout.shape)}", f"{flags.dtype} {list(flags.shape)}"
        raise fail(function, name, expected, got, "Call .bool() on 0s and 1s; one per token.")


def per_token(function: str, name: str, values: Tensor | None, layout: Layout) -> Tensor | None:
    """A float per token, detached, in a dtype of its own."""
    if values is None:
        return None
    check_operands(function, **{name: values})
    check_float(function, name, values)
    if tuple(values.shape) != layout.shape:
        expected, got = f"one value per token, {list(layout.shape)}", f"{list(values.shape)}"
        raise fail(function, name, expected, got, "Give it in the layout of the log-probs.")
    return values.detach()


def operand(function: str, name: str, values: Tensor | None, layout: Layout) -> Tensor | None:
    """A float per sequence as [B, 1], or per token; detached, in the accumulation dtype."""
    if values is None:
        return None
    check_operands(function, **{name: values})
    check_float(function, name, values)
    B, shape = layout.sequences, tuple(values.shape)
    if shape not in ((B,), (B, 1), layout.shape):
        expected = f"one value per sequence [{B}] or per token {list(layout.shape)}"
        raise fail(function, name, expected, f"{list(shape)}", "Give one row per sequence.")
    values = values.detach().to(layout.dtype)
    if shape == layout.shape == (B,):
        values = _either_reading(function, name, values, layout)
    return values[:, None] if shape == (B,) else values


def _either_reading(function: str, name: str, values_B: Tensor, layout: Layout) -> Tensor:
    """One value per sequence and per packed token alike, of as many sequences as tokens.

    Both readings agree where a sequence is the token at its own place, and where it is empty.
    Elsewhere it is an error on the CPU; on other devices, where a look would wait, NaN.
    """
    starts_B, ends_B = layout.offsets[:-1], layout.offsets[1:]
    places_B = torch.arange(layout.sequences, device=layout.device)
    same_B = (starts_B == places_B) & (ends_B == places_B + 1) | (starts_B == ends_B)
    on_cpu = layout.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and not same_B.all():
        expected = f"[{layout.sequences}, 1], as there are as many sequences as tokens"
        remedy = "One per sequence is values[:, None]; for one per token leave out empty sequences."
        raise fail(function, name, expected, f"{list(values_B.shape)}", remedy)
    return torch.where(same_B, values_B, torch.nan)


def active_tokens(mask: Tensor | None, layout: Layout) -> Tensor:
    """Bool per token: in the mask, and in a sequence."""
    if layout.offsets is None:
        everywhere = torch.ones(layout.shape, dtype=torch.bool, device=layout.device)
        return everywhere if mask is None else mask
    places_N = torch.arange(layout.shape[0], device=layout.device)
    inside_N = (places_N >= layout.offsets[0]) & (places_N < layout.offsets[-1])
    return inside_N if mask is None else inside_N & mask


def on_tokens(values: Tensor, layout: Layout) -> Tensor:
    """What :func:`operand` gives, for every token."""
    if values.shape == layout.shape:
        return values
    return layout.to_tokens(values[:, 0]).expand(layout.shape)
