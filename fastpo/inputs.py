"""What the tensors of a method are: marked in its signature, read by trainers, errors and tests.

    def ofs_dpo(policy_chosen: Trained, ..., slow_chosen: Trained, ...): ...
    def inpo(..., history_chosen: Annotated[Sequence[Tensor], ESSENTIAL] = (), ...): ...
    def rrpo(policy_chosen: Annotated[Trained, Over("the phrases that differ")], ...): ...
    def f_dpo(..., divergence: Annotated[Divergence, Is("reverse_kl", "dpo")] = "reverse_kl"): ...
    def gdpo(..., lengths: Annotated[Tensor | None, When(convention="verl")] = None, ...): ...

A function of a user may carry the same marks; a tensor without a mark is a constant of the batch.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

from torch import Tensor

TRAINED = "trained"
# Optional in the formula, but without it the method is another one, such as plain DPO.
ESSENTIAL = "essential"
# A tensor that needs a gradient: who trains computes it anew at every step from the model, and a
# column of numbers in its place would be another method.
Trained = Annotated[Tensor, TRAINED]


class Over(NamedTuple):
    """A statistic of something else than the whole response to the prompt of its row.

    Attributes:
        text: what it is of.
    """

    text: str


class Is(NamedTuple):
    """An option that makes the method another one.

    Attributes:
        value: of the option.
        method: what it then is.
    """

    value: Any
    method: str


class When:
    """An input that is read under these options alone, and refused under others."""

    def __init__(self, **options: Any):
        self.options = options


class Input(NamedTuple):
    """A tensor argument of a method.

    Attributes:
        is_required: has no default.
        is_trained: needs a gradient.
        is_essential: makes the method, though it has a default.
        is_sequence: several tensors.
        over: what it is of, if that is not the whole response to its prompt; else empty.
        when: options under which it is read; empty for always.
    """

    is_required: bool = False
    is_trained: bool = False
    is_essential: bool = False
    is_sequence: bool = False
    over: str = ""
    when: Mapping[str, Any] = MappingProxyType({})

    def is_read(self, options: dict[str, Any]) -> bool:
        """Whether the method reads it under these options."""
        return all(options.get(name) == value for name, value in self.when.items())


def _marks(hint: Any) -> list[Any]:
    """The marks of an annotation, those inside a union included."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Annotated:
        parts = parts[:1]  # The others are its marks.
    inside = [mark for part in parts for mark in _marks(part)]
    return [*getattr(hint, "__metadata__", ()), *inside]


def _hints(function: Callable) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # of a user's function: names that only its checker knows
        return {n: p.annotation for n, p in inspect.signature(function).parameters.items()}


def plain(function: Callable, options: Mapping[str, Any]) -> str:
    """Name of the plainer method that a method is under these options; empty if it is its own.

    Example:
        >>> from fastpo import losses
        >>> plain(losses.f_dpo, {}), plain(losses.f_dpo, {"divergence": "forward_kl"})
        ('dpo', '')
    """
    parameters = inspect.signature(function).parameters
    for name, hint in _hints(function).items():
        for mark in _marks(hint):
            if isinstance(mark, Is) and options.get(name, parameters[name].default) == mark.value:
                return mark.method
    return ""


@cache
def inputs_of(function: Callable) -> Mapping[str, Input]:
    """The arguments of a method that are tensors, by name; its other arguments are options.

    Example:
        >>> from fastpo import losses
        >>> [name for name, x in inputs_of(losses.ofs_dpo).items() if x.is_trained]
        ['policy_chosen', 'policy_rejected', 'slow_chosen', 'slow_rejected']
    """
    if inspect.isclass(function):
        return MappingProxyType({})
    hints, found = _hints(function), {}
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints.get(name, "")
        if "Tensor" not in str(hint) and "Trained" not in str(hint):
            continue
        marks = _marks(hint)
        found[name] = Input(
            is_required=parameter.default is parameter.empty,
            is_trained=TRAINED in marks,
            is_essential=ESSENTIAL in marks,
            is_sequence="Sequence" in str(hint) or "list" in str(hint),
            over=next((mark.text for mark in marks if isinstance(mark, Over)), ""),
            when=next((mark.options for mark in marks if isinstance(mark, When)), {}),
        )
    return MappingProxyType(found)
