"""What the weights share: checks, positions of response tokens, random numbers and memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastpo.checks import check_tensors


def fail(function: str, argument: str, expected: str, got: str, remedy: str) -> ValueError:
    """The error of every check: what was expected, what came and what to do."""
    name = f"fastpo.weights.{function}: {argument}"
    return ValueError(f"{name}: expected {expected}, got {got}. {remedy}")


def check_range(
    function: str, argument: str, value: float, low: float, high: float, remedy: str
) -> None:
    """``low <= value <= high``."""
    if not low <= value <= high:
        raise fail(function, argument, f"a number in [{low:g}, {high:g}]", repr(value), remedy)


def check_masks(function: str, **masks: Tensor) -> None:
    """Bool masks [B, T] of one batch: T may differ, B and the device may not."""
    check_tensors(f"weights.{function}", **masks)
    first = next(iter(masks))
    for name, mask in masks.items():
        if mask.ndim != 2 or mask.dtype != torch.bool:
            remedy = "Pad the sequences to rows and call mask.bool()."
            raise fail(function, name, "bool [B, T]", f"{mask.dtype} {list(mask.shape)}", remedy)
        if mask.shape[0] != masks[first].shape[0] or mask.device != masks[first].device:
            expected = f"{masks[first].shape[0]} rows on {masks[first].device} as {first}"
            remedy = "Give both responses of every pair, in the same order, on one device."
            raise fail(function, name, expected, f"{mask.shape[0]} on {mask.device}", remedy)


def check_like(function: str, argument: str, tensor: Tensor, name: str, other: Tensor) -> None:
    """One shape and one device."""
    check_tensors(f"weights.{function}", **{argument: tensor, name: other})
    if tensor.shape != other.shape or tensor.device != other.device:
        expected = f"shape {list(other.shape)} on {other.device} as {name}"
        got = f"{list(tensor.shape)} on {tensor.device}"
        raise fail(function, argument, expected, got, "Both are per token or both per sequence.")


def accumulation(tensor: Tensor) -> Tensor:
    """Detached, in float32 or, if it is, float64."""
    return tensor.detach().to(torch.promote_types(torch.float32, tensor.dtype))


def positions(mask_BT: Tensor) -> Tensor:
    """[B, T] number of masked tokens before each token: its position in the response."""
    return mask_BT.long().cumsum(1) - mask_BT.long()


def uniform(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None):
    """Numbers in [0, 1), drawn where the generator lives."""
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=source).to(device, non_blocking=True)


class Memory(nn.Module):
    """A module whose buffers stay as wide as they are where a model around them is cast to less."""

    def _apply(self, fn, recurse=True):
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = getattr(self, name)
            if torch.promote_types(buffer.dtype, after.dtype) != after.dtype:
                setattr(self, name, buffer.to(after.device))
        return self
