"""What ranks have to share; the only file that imports torch.distributed."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor


def all_reduce_sum(group: dist.ProcessGroup | None = None) -> Callable[[Tensor], Tensor]:
    """A function that sums a tensor over the ranks of a group and returns the sum.

    Without an initialised process group it returns the tensor as it is. The tensor given is left
    alone; no gradient flows through.

    Args:
        group: the ranks to sum over; all of them if not given.

    Example:
        >>> all_reduce_sum()(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """

    def all_reduce(tensor: Tensor) -> Tensor:
        if not (dist.is_available() and dist.is_initialized()):
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    return all_reduce
