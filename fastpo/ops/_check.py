"""Checks at the public boundary: every message says what, expected, got and the remedy."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fail(op: str, argument: str, expected: str, got: str, remedy: str) -> ValueError:
    """The error every check raises."""
    return ValueError(f"fastpo.{op}: {argument}: expected {expected}, got {got}. {remedy}")


def check_float(op: str, argument: str, tensor: torch.Tensor) -> None:
    """A float tensor of a supported type."""
    if tensor.dtype not in FLOATS:
        expected = "float32, bfloat16, float16 or float64"
        raise fail(op, argument, expected, str(tensor.dtype), "Cast it with .to(torch.float32).")


def check_same_dtype(op: str, names: str, first: torch.Tensor, second: torch.Tensor) -> None:
    """Two tensors of one dtype, as ``F.linear`` asks."""
    if first.dtype != second.dtype:
        got = f"{first.dtype} and {second.dtype}"
        raise fail(op, names, "one dtype", got, "Cast one of them, or run under torch.autocast.")


def check_same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """All given tensors on one device."""
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        got = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise fail(op, "devices", "all tensors on one device", got, "Move them with .to(device).")


def check_shape(
    op: str, argument: str, tensor: torch.Tensor, shape: tuple[int, ...], why: str
) -> None:
    """Exactly ``shape``; ``why`` says where it comes from."""
    if tuple(tensor.shape) != tuple(shape):
        raise fail(op, argument, f"shape {tuple(shape)} ({why})", str(tuple(tensor.shape)), "")


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


def check_positive(op: str, argument: str, value: float) -> None:
    """A positive finite number."""
    if not (value > 0 and value < float("inf")):
        raise fail(op, argument, "a positive finite number", repr(value), "")


def check_transform(
    op: str, logit_scale: float, softcap: float | None, temperature: float
) -> tuple[float, float, float]:
    """What turns logits into z, as the ops take it: scale, soft-cap (0 for none), temperature."""
    check_positive(op, "temperature", temperature)
    if softcap is not None:
        check_positive(op, "softcap", softcap)
    return float(logit_scale), 0.0 if softcap is None else float(softcap), float(temperature)


def check_first_derivative(op: str) -> None:
    """Not under ``create_graph=True``, where autograd would take the gradient for a constant."""
    if torch.is_grad_enabled():
        remedy = "Second derivatives are not implemented."
        message = f"fastpo.{op}: backward: expected create_graph=False, got True. {remedy}"
        raise RuntimeError(message)
