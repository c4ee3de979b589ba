"""Advantages by the name of the method, on one rank or on all ranks' rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastpo.advantages._common import fail
from fastpo.advantages.bnpo import bnpo
from fastpo.advantages.components import gdpo, mo_grpo, sum_rewards, weighted_sum_grpo
from fastpo.advantages.dgpo import dgpo
from fastpo.advantages.gigpo import gigpo
from fastpo.advantages.ngrpo import ngrpo
from fastpo.advantages.passk import passk_analytic, passk_max
from fastpo.advantages.relative import dr_grpo, gpg, grpo, opo
from fastpo.advantages.rloo import rloo
from fastpo.advantages.whitened import reinforce_pp_baseline
from fastpo.checks import check_tensors
from fastpo.distributed import gather_rows
from fastpo.groups import Groups
from fastpo.inputs import inputs_of

if TYPE_CHECKING:
    from fastpo.distributed import ProcessGroup

METHODS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        bnpo, dgpo, dr_grpo, gdpo, gigpo, gpg, grpo, mo_grpo, ngrpo, opo, passk_analytic, passk_max,
        reinforce_pp_baseline, rloo, weighted_sum_grpo,
    )
}  # fmt: skip
_PARAMETERS = {
    name: {k: p.default for k, p in list(inspect.signature(function).parameters.items())[2:]}
    for name, function in METHODS.items()
}
# Arguments with one value per row, and the components' weights, which ranks share.
_TENSORS = {name for function in METHODS.values() for name in inputs_of(function)}
_ROW_OPTIONS = sorted(_TENSORS - {"rewards", "groups", "reward_weights"})


def _check_options(method: str, options: dict[str, Any]) -> None:
    if method not in METHODS:
        expected = f"one of {', '.join(METHODS)}"
        remedy = "Each is a function of fastpo.advantages, too."
        raise fail("group_advantages", "method", expected, repr(method), remedy)
    parameters = _PARAMETERS[method]
    for name in options:
        if name not in parameters:
            expected = f"of {', '.join(parameters)}"
            remedy = f"See fastpo.advantages.{method}."
            raise fail("group_advantages", f"options of {method}", expected, repr(name), remedy)
    for name, default in parameters.items():
        if default is inspect.Parameter.empty and name not in options:
            remedy = f"See fastpo.advantages.{method}."
            raise fail("group_advantages", name, f"given for {method}", "none", remedy)


def group_advantages(
    rewards: Tensor,
    groups: Groups | Tensor | int | None = None,
    method: str = "grpo",
    *,
    reward_weights: Tensor | Sequence[float] | None = None,
    process_group: ProcessGroup | None = None,
    **options: Any,
) -> Tensor:
    """Advantages of groups of responses by a method's name; also over the rows of all ranks.

    Calls the function of that name in ``fastpo.advantages``: bnpo, dgpo, dr_grpo, gdpo, gigpo, gpg,
    grpo, mo_grpo, ngrpo, opo, passk_analytic, passk_max, reinforce_pp_baseline, rloo or
    weighted_sum_grpo.

    With ``process_group`` rewards, ids and every other tensor of one value per row are gathered
    from its ranks, the method runs on the whole batch in the order of the ranks, and this rank's
    rows come back: the same bits as on one rank. Ranks may have different numbers of rows, and a
    group's ids may lie on several ranks. The numbers of rows are exchanged first, which waits for
    the device.

    Advantages are constants of every method: rewards, and other tensors, that require a gradient
    are detached here and get none.

    Args:
        rewards: [N] with ``groups``, or [P, G] without: each row a group; NaN where a response
            could not be scored. With one more dimension K for several rewards: ``gdpo``,
            ``mo_grpo`` and ``weighted_sum_grpo`` take them apart, the others their sum.
        groups: the size of every group, int ids [N], or :class:`fastpo.Groups`. With
            ``process_group`` a size, which has to divide the rows of all ranks together, or ids
            that mean the same on all ranks.
        method: one of the names above.
        reward_weights: [K] for several rewards; 1 if not given.
        process_group: the ranks that share the batch; this one alone if not given.
        **options: of the method's function.

    Returns:
        [N] or [P, G] float32, or float64 for float64 rewards. No gradient. NaN on a GPU where the
        squares of rewards overflow in a standard deviation, which is an error on the CPU.

    Raises:
        ValueError: the method or an option is unknown or missing, ranks have tensors of different
            kinds, or what the method's function raises.

    Example:
        >>> rewards = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
        >>> group_advantages(rewards, 3, "rloo")
        tensor([ 0.5000, -1.0000,  0.5000, -0.5000, -0.5000,  1.0000])
        >>> group_advantages(rewards, torch.tensor([4, 4, 9, 9, 4, 9]), "grpo", convention="verl")
        tensor([ 1.1547, -0.5773,  0.5773, -1.1547, -0.5773,  0.5773])
    """
    check_tensors("group_advantages", rewards=rewards)
    if reward_weights is not None and "reward_weights" in _PARAMETERS.get(method, ()):
        options["reward_weights"] = reward_weights
    _check_options(method, options)
    has_components = rewards.ndim == 2 + (groups is None)
    if "reward_weights" not in _PARAMETERS[method]:
        if has_components:
            rewards = sum_rewards(rewards, reward_weights)
        elif reward_weights is not None:
            remedy = "Stack the components in the last dimension."
            got = f"rewards {list(rewards.shape)}"
            raise fail("group_advantages", "reward_weights", "rewards [..., K]", got, remedy)
    function = METHODS[method]
    if process_group is None:
        return function(rewards, groups, **options)
    per_row = {"rewards": rewards, "groups": groups}
    per_row |= {name: options[name] for name in _ROW_OPTIONS if name in options}
    for name, value in per_row.items():
        if isinstance(value, Groups):
            remedy = "Pass ids, alike on all ranks, or a size."
            raise fail("group_advantages", name, "ids with a process group", "Groups", remedy)
    tensors = {name: value for name, value in per_row.items() if isinstance(value, Tensor)}
    gathered, start = gather_rows(tensors, process_group)
    rewards, groups = gathered.pop("rewards"), gathered.pop("groups", groups)
    advantages = function(rewards, groups, **options | gathered)
    return advantages[start : start + per_row["rewards"].shape[0]].clone()
