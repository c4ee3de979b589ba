"""Checks at the public boundary: every message says what, expected, got and the remedy."""

from __future__ import annotations

from itertools import pairwise

import torch

from fastpo.checks import fail

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_float(op: str, argument: str, tensor: torch.Tensor) -> None:
    """A float tensor of a supported type."""
    if tensor.dtype not in FLOATS:
        expected = "float32, bfloat16, float16 or float64"
        remedy = "Cast it with .to(torch.float32); dequantise it first if it holds a code."
        raise fail(op, argument, expected, str(tensor.dtype), remedy)


def check_same_dtype(op: str, names: str, first: torch.Tensor, second: torch.Tensor) -> None:
    """Two tensors of one dtype, as ``F.linear`` asks."""
    if first.dtype != second.dtype:
        got = f"{first.dtype} and {second.dtype}"
        raise fail(op, names, "one dtype", got, "Cast one of them, or run under torch.autocast.")


def check_shape(
    op: str, argument: str, tensor: torch.Tensor, shape: tuple[int, ...], why: str
) -> None:
    """Exactly ``shape``; ``why`` says where it comes from."""
    got = tuple(tensor.shape)
    if got == tuple(shape):
        return
    remedy = "Slice or reshape it, or what it has to fit."
    if got in ((*shape, 1), (1, *shape)):
        remedy = f"Call .squeeze({-1 if got == (*shape, 1) else 0})."
    raise fail(op, argument, f"shape {tuple(shape)} ({why})", str(got), remedy)


def check_targets(op: str, targets: torch.Tensor, vocab: int, ignore_index: int) -> None:
    """int64 targets, and on the CPU, where it costs no synchronisation, inside the vocabulary.

    On other devices a target out of range poisons its own row with NaN instead.
    """
    if targets.dtype != torch.int64:
        raise fail(op, "targets", "int64 token ids", str(targets.dtype), "Call targets.long().")
    if targets.device.type != "cpu" or targets.numel() == 0 or torch.compiler.is_compiling():
        return
    bad = ((targets < 0) | (targets >= vocab)) & (targets != ignore_index)
    if bad.any():
        where = bad.nonzero()[0].tolist()
        got = f"{targets[tuple(where)].item()} at index {where}"
        remedy = (
            f"Mark tokens to skip with ignore_index ({ignore_index}); padded vocabularies count."
        )
        raise fail(op, "targets", f"token ids in [0, {vocab})", got, remedy)


def check_offset_values(op: str, cu_seqlens: torch.Tensor, length: int) -> None:
    """Offsets that rise within the tokens; read on the CPU alone, elsewhere it would wait."""
    if cu_seqlens.device.type != "cpu":
        return
    bounds = [0, *cu_seqlens.tolist(), length]
    falls = next(((a, b) for a, b in pairwise(bounds) if a > b), None)
    if falls is not None:
        remedy = "Pass cumulative lengths, torch.cumsum of the sequence lengths with 0 in front."
        expected = f"numbers that never fall, in [0, {length}]"
        raise fail(op, "cu_seqlens", expected, f"{falls[0]} before {falls[1]}", remedy)


def check_offsets(op: str, cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """Cumulative lengths [B + 1] of packed tokens, as int64."""
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        expected, remedy = "int32 or int64", "Cast it with .to(torch.int64)."
        raise fail(op, "cu_seqlens", expected, f"{cu_seqlens.dtype}", remedy)
    if cu_seqlens.ndim != 1 or not cu_seqlens.shape[0]:
        remedy = "Start with 0, then add the length of each sequence."
        raise fail(op, "cu_seqlens", "shape [B + 1]", f"{list(cu_seqlens.shape)}", remedy)
    if not torch.compiler.is_compiling():
        check_offset_values(op, cu_seqlens, length)
    return cu_seqlens.long()


def check_positive(op: str, argument: str, value: float) -> None:
    """A positive finite number."""
    if not (value > 0 and value < float("inf")):
        remedy = "Leave it out for the default."
        raise fail(op, argument, "a positive finite number", repr(value), remedy)


def check_transform(
    op: str, logit_scale: float, softcap: float | None, temperature: float
) -> tuple[float, float, float]:
    """What turns logits into z, as the ops take it: scale, soft-cap (0 for none), temperature."""
    check_positive(op, "temperature", temperature)
    if softcap is not None:
        check_positive(op, "softcap", softcap)
    return float(logit_scale), 0.0 if softcap is None else float(softcap), float(temperature)
