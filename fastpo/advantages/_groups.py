"""What the group methods share: rows and their groups, groups of one, statistics of batches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastpo.advantages._common import fail
from fastpo.checks import check_operands
from fastpo.groups import Groups, GroupStats
from fastpo.ops import group_stats as ops
from fastpo.tiles import accumulation_dtype

Singleton = Literal["zero", "reward"]
SINGLETONS = get_args(Singleton)


class Rows(NamedTuple):
    """Rewards row by row.

    Attributes:
        rewards: [N], or [N, K] of K components, without gradient.
        groups: of the rows.
        shape: of the result, [N] or [P, G].
    """

    rewards: Tensor
    groups: Groups
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        """Of the result."""
        return accumulation_dtype(self.rewards.dtype)

    # Of one component the two ops are called without the checks of group_stats and group_affine,
    # and without their views, which cost as much as a launch each.

    def stats(self, weights_N: Tensor | None = None) -> GroupStats:
        """Statistics of the rewards, or of the rewards with weights."""
        weights_N1 = None if weights_N is None else weights_N.to(self.dtype).unsqueeze(1)
        stats_RG1, arg_max_G1 = ops.group_stats(
            self.rewards.unsqueeze(1), weights_N1, *self.groups.layout
        )
        return GroupStats(*stats_RG1.squeeze(2).unbind(0), arg_max_G1.squeeze(1))

    def affine(self, base_G: Tensor, scale_G: Tensor) -> Tensor:
        """(reward - base) * scale of each row's group, in the shape of the result."""
        base_G1, scale_G1 = base_G.unsqueeze(1), scale_G.unsqueeze(1)
        out_N = ops.group_affine(
            self.rewards.unsqueeze(1), base_G1, scale_G1, *self.groups.layout, True
        )
        return out_N if len(self.shape) == 1 else out_N.view(self.shape)

    def per_row(self, function: str, **tensors: Tensor) -> list[Tensor]:
        """Tensors in the shape of the rewards to [N], in the result's type or a wider one."""
        out = []
        check_operands(f"advantages.{function}", **tensors)
        for name, tensor in tensors.items():
            if tensor.shape != self.shape or tensor.device != self.rewards.device:
                expected = f"{list(self.shape)} on {self.rewards.device}, as rewards"
                got = f"{list(tensor.shape)} on {tensor.device}"
                raise fail(function, name, expected, got, "One value per reward.")
            dtype = torch.promote_types(self.dtype, tensor.dtype)
            out.append(tensor.detach().reshape(-1).to(dtype))
        return out


def check_rewards(
    function: str, rewards: Tensor, groups: Groups | Tensor | int | None, components: bool = False
) -> None:
    """Floats [N] with groups, or [P, G] without; with one more dimension for components."""
    check_operands(f"advantages.{function}", rewards=rewards)
    last = ", K" if components else ""
    if rewards.ndim != 1 + components + (groups is None):
        expected = f"[P, G{last}] without groups or [N{last}] with"
        remedy = "Pass groups=G, or ids, for rewards in one row after the other."
        raise fail(function, "rewards", expected, list(rewards.shape), remedy)
    if not rewards.is_floating_point():
        raise fail(function, "rewards", "floats", rewards.dtype, "Call rewards.float().")


def rows_of(
    function: str, rewards: Tensor, groups: Groups | Tensor | int | None, components: bool = False
) -> Rows:
    """Rewards as :func:`check_rewards` takes them, row by row.

    Raises:
        ValueError: they are of another shape or no floats, or the groups do not fit.
    """
    check_rewards(function, rewards, groups, components)
    shape = rewards.shape[: rewards.ndim - components]
    rewards_N = rewards.detach()
    if groups is None:
        rewards_N = rewards_N.reshape(shape[0] * shape[1], *rewards.shape[2:])
        groups = Groups.of_size(max(shape[1], 1), rewards_N.shape[0], rewards.device)
    else:
        groups = Groups.of(groups, shape[0], rewards.device)
        if groups.device != rewards.device:
            got = f"rewards on {rewards.device}, groups on {groups.device}"
            raise fail(function, "devices", "one device", got, "Move them with .to().")
    return Rows(rewards_N, groups, shape)


def check_choice(function: str, argument: str, value: object, choices: Iterable[str]) -> None:
    """One of a few words."""
    if value not in choices:
        expected = ", ".join(map(repr, choices))
        raise fail(function, argument, expected, repr(value), "Pick one of them.")


def check_range(function: str, argument: str, value: float, low: float, remedy: str) -> None:
    """A finite number that is at least ``low``."""
    if not low <= value < math.inf:
        raise fail(function, argument, f"a finite number >= {low}", value, remedy)


def is_checkable(tensor: Tensor) -> bool:
    """Whether looking at values is free: elsewhere it would wait for the device."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def baseline(stats: GroupStats, singleton: Singleton) -> Tensor:
    """[G] means; with ``reward``, 0 for groups of one value, whose advantage is then the value."""
    if singleton == "zero":
        return stats.mean
    return torch.where(stats.count == 1, 0.0, stats.mean)


def group_std(stats: GroupStats, singleton: Singleton, ddof: int, floor: float = 0.0) -> Tensor:
    """[G] standard deviations of variances >= ``floor``; with ``reward``, 1 for a single value."""
    variance = stats.variance(ddof)
    std = (variance.clamp_(min=floor) if floor else variance).sqrt_()
    return std if singleton == "zero" else torch.where(stats.count == 1, 1.0, std)


def batch_std(stats: GroupStats, ddof: int) -> Tensor:
    """Standard deviation of all values of all groups, 0 without any; a scalar."""
    count = stats.count.sum()
    mean = (stats.count * stats.mean).sum() / count.clamp(min=1)
    m2 = (stats.m2 + stats.count * (stats.mean - mean).square()).sum()
    return (m2 / (count - ddof).clamp(min=1)).sqrt()


def reciprocal(std: Tensor, eps: float) -> Tensor:
    """1 / (std + eps), and 0 instead of infinity, where all that is scaled is 0.

    An infinite ``std``, of squares that overflow, would make every advantage 0. It is refused on
    the CPU; elsewhere, where looking would wait for the device, the advantages are NaN.
    """
    if is_checkable(std) and std.isinf().any():
        expected = f"numbers whose squares are finite in {std.dtype}"
        remedy = "Scale the rewards down, or pass float64."
        raise fail("group_advantages", "rewards", expected, "larger ones", remedy)
    std = std.nan_to_num(nan=torch.nan, posinf=torch.nan)
    scale = (std + eps).reciprocal_()
    return scale if eps else torch.where(std == 0, 0.0, scale)


def marked_rows(rows_M: Tensor, rows: int) -> Tensor:
    """Bool [N], true at the given row numbers; a number below 0 marks none."""
    marks = torch.zeros(rows + 1, dtype=torch.bool, device=rows_M.device)
    return marks.scatter_(0, torch.where(rows_M < 0, rows, rows_M), True)[:rows]
