"""Groups of rows, such as the responses to one prompt: how they lie, and their statistics.

Nothing here loops over groups or waits for the device: their statistics are one launch, whatever
their number and sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.checks import check_operands, check_tensors, fail
from fastpo.operands import GroupLayout
from fastpo.ops import group_stats as ops
from fastpo.ops._check import check_float
from fastpo.tiles import accumulation_dtype

_INTEGERS = (torch.int32, torch.int64)


def _check_integers(argument: str, tensor: Tensor, dims: str) -> None:
    check_operands("Groups", **{argument: tensor})
    if tensor.ndim != 1 or tensor.dtype not in _INTEGERS:
        got = f"{tensor.dtype} {list(tensor.shape)}"
        raise fail("Groups", argument, f"int32 or int64 [{dims}]", got, "Cast and flatten it.")


@dataclass(frozen=True, eq=False)
class Groups:
    """Which of N rows belong together; made by one of its three constructors, used many times.

    Attributes:
        rows: N.
        layout: what the kernels take; its ``count`` is the number of groups G.
        device: where they are.
    """

    rows: int
    layout: GroupLayout
    device: torch.device

    @cached_property
    def index(self) -> Tensor:
        """int64 [N], the group of each row; G for a row in no group."""
        offsets, order, size, _ = self.layout
        places_N = torch.arange(self.rows, device=self.device)
        if offsets is None:
            return places_N // size
        index_N = torch.searchsorted(offsets[1:], places_N, right=True)
        index_N = torch.where(places_N < offsets[0], self.count, index_N)
        return index_N if order is None else torch.empty_like(order).scatter_(0, order, index_N)

    @property
    def count(self) -> int:
        """G. With ids on a GPU and no ``num_groups`` it is N, and the last groups are empty."""
        return self.layout.count

    @classmethod
    def of_size(cls, size: int, rows: int, device: torch.device | str = "cpu") -> Groups:
        """Rows 0 ... size - 1, then the next ``size`` rows, and so on.

        Args:
            size: rows of every group, > 0.
            rows: N, a multiple of ``size``.
            device: of the rows.

        Raises:
            ValueError: the sizes do not fit.

        Example:
            >>> Groups.of_size(2, rows=4).index
            tensor([0, 0, 1, 1])
        """
        if size <= 0 or rows % size:
            expected, got = f"a divisor of the {rows} rows, > 0", str(size)
            raise fail("Groups", "size", expected, got, "Pass ids or offsets for ragged groups.")
        device = torch.device(device)
        if device.type != "cpu" and device.index is None:
            device = torch.empty(0, device=device).device  # the current one of its type
        return cls(rows, GroupLayout(None, None, size, rows // size), device)

    @classmethod
    def from_ids(cls, ids: Tensor, num_groups: int | None = None) -> Groups:
        """Rows of one id belong together, wherever they lie.

        Args:
            ids: int32 or int64 [N]; without ``num_groups`` any numbers, such as hashes, and groups
                are numbered in rising order of their ids.
            num_groups: ids lie in [0, num_groups), and an id is the number of its group. Other
                ids are checked on the CPU; elsewhere their rows belong to no group.

        Raises:
            ValueError: ids are not integers in one dimension, or out of range.

        Example:
            >>> Groups.from_ids(torch.tensor([7, -3, 7])).index
            tensor([1, 0, 1])
        """
        _check_integers("ids", ids, "N")
        rows, device, on_cpu = ids.shape[0], ids.device, ids.device.type == "cpu"
        if num_groups is not None and on_cpu and rows:
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= num_groups:
                remedy = "Leave num_groups out for ids of any value."
                raise fail("Groups", "ids", f"in [0, {num_groups})", f"{low} to {high}", remedy)
        sorted_N, order_N = ids.long().sort(stable=True)
        if num_groups is None:
            starts_N = torch.ones_like(sorted_N)
            starts_N[1:] = sorted_N[1:] != sorted_N[:-1]
            sorted_N = starts_N.cumsum(0) - 1
            num_groups = (int(sorted_N[-1]) + 1 if rows else 0) if on_cpu else rows
        offsets = torch.searchsorted(sorted_N, torch.arange(num_groups + 1, device=device))
        return cls(rows, GroupLayout(offsets, order_N, 0, num_groups), device)

    @classmethod
    def from_offsets(cls, offsets: Tensor, rows: int) -> Groups:
        """Neighbouring rows belong together: group g is rows offsets[g] ... offsets[g + 1] - 1.

        Args:
            offsets: int32 or int64 [G + 1], rising from 0 to N. Checked on the CPU alone.
            rows: N.

        Raises:
            ValueError: offsets are not integers in one dimension, or do not rise from 0 to N.

        Example:
            >>> Groups.from_offsets(torch.tensor([0, 1, 3]), rows=3).index
            tensor([0, 1, 1])
        """
        _check_integers("offsets", offsets, "G + 1")
        if not offsets.shape[0]:
            raise fail("Groups", "offsets", "[G + 1]", "[0]", "Start with 0.")
        offsets = offsets.long()
        if offsets.device.type == "cpu":
            first, last, falls = int(offsets[0]), int(offsets[-1]), (offsets.diff() < 0).any()
            if first != 0 or last != rows or falls:
                got = f"{first} to {last}{', falling in between' if falls else ''}"
                remedy = "Pass torch.cumsum of the sizes with 0 in front."
                raise fail("Groups", "offsets", f"rising from 0 to {rows}", got, remedy)
        layout = GroupLayout(offsets, None, 0, offsets.shape[0] - 1)
        return cls(rows, layout, offsets.device)

    @classmethod
    def of(cls, groups: Groups | Tensor | int, rows: int, device: torch.device) -> Groups:
        """Groups as they come to a public function: a size, ids of the rows, or made already.

        Raises:
            ValueError: they are of another number of rows.
        """
        if isinstance(groups, Tensor):
            groups = cls.from_ids(groups)
        elif not isinstance(groups, (Groups, Integral, torch.SymInt)):
            expected = "a size, int ids in a tensor or Groups"
            raise fail("Groups", "groups", expected, repr(groups), "Pass torch.tensor(ids).")
        elif not isinstance(groups, Groups):
            groups = cls.of_size(groups, rows, device)
        if groups.rows != rows:
            remedy = "Give one id per row."
            raise fail("Groups", "groups", f"{rows} rows", str(groups.rows), remedy)
        return groups


class GroupStats(NamedTuple):
    """Statistics of groups, each [G], or [G, K] of K components; c = value - mean of its group.

    Attributes:
        count: values that are not NaN.
        mean: their mean; exactly their value where all are equal, 0 without any.
        m2: sum of c^2; exactly 0 where all are equal.
        abs: sum of |c|.
        min: smallest value, inf without any.
        max: largest value, -inf without any.
        second_max: largest of the others, equal to ``max`` on ties; -inf without.
        weight: sum of the weights of values that are not NaN.
        weighted_mean: sum of weight * value over ``weight``; 0 where that is 0.
        arg_max: int64, the first row with the largest value; -1 without any.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor
    abs: Tensor
    min: Tensor
    max: Tensor
    second_max: Tensor
    weight: Tensor
    weighted_mean: Tensor
    arg_max: Tensor

    def variance(self, ddof: int = 1) -> Tensor:
        """m2 / (count - ddof); 0 where there are no more than ``ddof`` values.

        Args:
            ddof: 0 or 1.

        Raises:
            ValueError: ``ddof`` is another number.
        """
        if ddof not in (0, 1):
            raise fail("GroupStats", "ddof", "0 or 1", str(ddof), "1 is the sample variance.")
        # m2 is 0 already where there are no more than ddof values.
        return self.m2 / (self.count - ddof).clamp_(min=1)

    def std(self, ddof: int = 1) -> Tensor:
        """Square root of :meth:`variance`."""
        return self.variance(ddof).sqrt_()


def _check_values(function: str, values: Tensor) -> None:
    check_operands(function, values=values)
    check_float(function, "values", values)
    if values.ndim not in (1, 2):
        got = str(list(values.shape))
        raise fail(function, "values", "[N] or [N, K]", got, "Reshape it to rows.")


def _groups_of(function: str, values: Tensor, groups: Groups | Tensor | int) -> Groups:
    groups = Groups.of(groups, values.shape[0], values.device)
    if groups.device != values.device:
        got = f"values on {values.device}, groups on {groups.device}"
        raise fail(function, "devices", "all tensors on one device", got, "Move them with .to().")
    return groups


def _columns(tensor: Tensor) -> Tensor:
    """[N, K] of [N] or [N, K], without gradient."""
    return tensor.detach().unsqueeze(1) if tensor.ndim == 1 else tensor.detach()


def group_stats(
    values: Tensor, groups: Groups | Tensor | int, weights: Tensor | None = None
) -> GroupStats:
    """Statistics of ragged groups of rows in one launch; NaN marks a value that is not there.

    Args:
        values: [N], or [N, K] of K components; float32, bfloat16, float16 or float64.
        groups: the size of every group, int ids [N], or :class:`Groups`.
        weights: [N], or [N, K], of ``weight`` and ``weighted_mean``; 1 if not given.

    Returns:
        GroupStats in float32, or float64 for float64 values. No gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Example:
        >>> stats = group_stats(torch.tensor([1.0, 0.0, 0.5, 2.0]), torch.tensor([0, 0, 0, 1]))
        >>> stats.mean, stats.std(), stats.arg_max
        (tensor([0.5000, 2.0000]), tensor([0.5000, 0.0000]), tensor([0, 3]))
    """
    check_tensors("group_stats", {"weights": weights})
    _check_values("group_stats", values)
    groups = _groups_of("group_stats", values, groups)
    values_NK, weights_NK = _columns(values), None
    if weights is not None:
        check_operands("group_stats", {"weights": weights}, values=values)
        if weights.shape not in (values.shape[:1], values.shape):
            expected, got = f"[N] or the shape of values {list(values.shape)}", list(weights.shape)
            raise fail("group_stats", "weights", expected, str(got), "Expand it.")
        weights_NK = _columns(weights).to(accumulation_dtype(values.dtype))
    stats_RGK, arg_max_GK = ops.group_stats(values_NK, weights_NK, *groups.layout)
    if values.ndim == 1:
        stats_RGK, arg_max_GK = stats_RGK.squeeze(2), arg_max_GK.squeeze(1)
    return GroupStats(*stats_RGK.unbind(0), arg_max_GK)


def group_affine(
    values: Tensor, groups: Groups | Tensor | int, base: Tensor, scale: Tensor
) -> Tensor:
    """(value - base) * scale of each row's group, and their sum over components; NaN gives 0.

    Args:
        values: [N], or [N, K] of K components.
        groups: as in :func:`group_stats`.
        base: [G], or [G, K] as values.
        scale: as ``base``.

    Returns:
        [N] in float32, or float64 for float64 values. Rows in no group are 0. No gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Example:
        >>> values, groups = torch.tensor([1.0, 0.0, 2.0]), Groups.from_ids(torch.tensor([0, 0, 1]))
        >>> group_affine(values, groups, torch.tensor([0.5, 2.0]), torch.tensor([2.0, 1.0]))
        tensor([ 1., -1.,  0.])
    """
    _check_values("group_affine", values)
    check_operands("group_affine", values=values, base=base, scale=scale)
    groups = _groups_of("group_affine", values, groups)
    shape, acc = (groups.count, *values.shape[1:]), accumulation_dtype(values.dtype)
    for name, tensor in (("base", base), ("scale", scale)):
        if tensor.shape != shape:
            remedy = "Give one number per group, and per component of values [N, K]."
            got = str(list(tensor.shape))
            raise fail("group_affine", name, f"shape {list(shape)}", got, remedy)
    base_GK, scale_GK = (_columns(x).to(acc) for x in (base, scale))
    return ops.group_affine(_columns(values), base_GK, scale_GK, *groups.layout, True)
