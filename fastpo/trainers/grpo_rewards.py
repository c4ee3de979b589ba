"""Reward functions: their names on the command line, their calls, their weighted sum."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import faulthandler
import functools
import inspect
import math
import os
import pkgutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from fastpo.trainers.options import ConfigError, items
from fastpo.trainers.sampling import Prompt

# Called by keywords; a number per completion, None or NaN for no score.
Reward = Callable[..., Sequence[float | None]]

# What every reward function is given, beside the columns of the rows.
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state")
# Seconds beyond the limit in which the thread that waits for a function would have raised.
_GRACE = 5.0


class RewardError(RuntimeError):
    """A reward function raised, or gave something else than a number per completion."""


def number(value: Any, where: str) -> float:
    """A reward as a float; NaN for None.

    Raises:
        RewardError: it is no number that is finite in float32.
    """
    if value is None:
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    # Beyond float32, which advantages are computed in, a number is infinite there.
    if abs(number) > torch.finfo(torch.float32).max or isinstance(value, str):
        remedy = "It has to fit float32; None or NaN stands for no score."
        raise RewardError(f"{where}: expected a finite number, got {value!r:.80}. {remedy}")
    return number


class Rewards:
    """Several reward functions and their weights.

    Args:
        functions: each called by keywords, as in TRL, with lists of the same length: ``prompts`` as
            they came (text or messages), ``completions`` (texts without special tokens, or a list
            of one assistant message where the prompt is messages), ``completion_ids``, every other
            column of the rows, and with ``trainer_state``. A function without ``**kwargs`` is
            given those that it names. Each gets lists and dicts of its own, which it may change.
            They return a number per completion, None or NaN for no score; they may be ``async``.
            They run in the caller's grad, inference and autocast modes.
        weights: of the functions; 1 if not given.
        seconds: that one call may take. It runs in a thread of its own, so that it can be given up
            even if it swallows exceptions; one that does not let go of the interpreter, as a
            regular expression may, is ended with the program, and the trace names it. 0 for no
            limit: functions run in the calling thread then, as those need that set signals.

    Raises:
        ConfigError: there is no function, not a finite weight per function, no weight but 0, or
            the limit is out of range.

    Example:
        >>> short = lambda completions, **columns: [-len(c) for c in completions]
        >>> right = lambda completions, answer: [c == a for c, a in zip(completions, answer)]
        >>> rewards = Rewards([short, right], [0.1, 1.0])
        >>> parts = rewards(["1+1=", "1+1="], ["2", "11"], answer=["2", "2"])
        >>> parts, [rewards.total(part) for part in parts]
        ([[-1.0, 1.0], [-2.0, 0.0]], [0.9, -0.2])
    """

    def __init__(
        self,
        functions: Sequence[Reward],
        weights: Sequence[float] | None = None,
        seconds: float = 600.0,
    ):
        if not functions:
            remedy = "Give one, as --reward package.module:function."
            raise ConfigError(f"reward: there is no reward function. {remedy}")
        self.functions, self.seconds = list(functions), seconds
        self.weights = [1.0] * len(self.functions) if weights is None else list(weights)
        if len(self.weights) != len(self.functions):
            counts = f"{len(self.functions)} functions and {len(self.weights)} weights"
            raise ConfigError(f"reward_weights: expected one per function, got {counts}.")
        if not any(self.weights) or not all(map(math.isfinite, self.weights)):
            problem = f"expected finite numbers that are not all 0, got {self.weights}"
            raise ConfigError(f"reward_weights: {problem}.")
        if not 0 <= seconds < math.inf:
            raise ConfigError(f"reward_seconds: expected 0 or more, got {seconds}. 0 is no limit.")

    def check(self, columns: Iterable[str]) -> None:
        """Whether every function can be called with what there is.

        Raises:
            ConfigError: one has a parameter that is neither a column nor given to all.
        """
        available = (*GIVEN, *columns)
        for function in self.functions:
            missing = [name for name in _needed(function) if name not in available]
            if missing:
                remedy = "Rewards are called by these keywords: name parameters so, or add a column"
                raise ConfigError(
                    f"reward {_name(function)}: takes {', '.join(missing)}; there are "
                    f"{', '.join(available)}. {remedy}."
                )

    def __call__(
        self, prompts: list[Prompt], completions: list[Any], **columns: Any
    ) -> list[list[float]]:
        """The rewards [R] of each completion, NaN where a function gave no score.

        Raises:
            RewardError: a function raised, took too long, or gave something else than a number per
                completion.
        """
        given = {"prompts": prompts, "completions": completions, **columns}
        found = [_scores(function, given, self.seconds) for function in self.functions]
        return [list(rewards) for rewards in zip(*found, strict=True)]

    def total(self, rewards: Sequence[float]) -> float:
        """Weighted sum of the rewards of a completion that are there; NaN without any."""
        there = [w * r for w, r in zip(self.weights, rewards, strict=True) if not math.isnan(r)]
        return sum(there) if there else math.nan


def _name(function: Reward) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__qualname__", type(function).__qualname__)


def _parameters(function: Reward) -> dict[str, inspect.Parameter] | None:
    """The parameters of a function, None where it takes any keyword or does not say."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of C
        return None
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return None if takes_any else dict(parameters)


def _needed(function: Reward) -> list[str]:
    """Names of the parameters without a default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variable]


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for all asynchronous rewards, whose clients may live longer than a call."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="asynchronous rewards", daemon=True).start()
    return loop


Modes = Callable[[], contextlib.AbstractContextManager]


def _torch_modes() -> Modes:
    """Makes contexts with the caller's modes of torch, each of which is one of the thread."""
    with_grad, in_inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    types = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    dtypes = {kind: torch.get_autocast_dtype(kind) for kind in types}

    @contextlib.contextmanager
    def modes() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(in_inference))
            stack.enter_context(torch.set_grad_enabled(with_grad))
            for kind, dtype in dtypes.items():
                stack.enter_context(torch.autocast(kind, dtype))
            yield

    return modes


async def _awaited(found: Any, modes: Modes) -> Any:
    with modes():
        return await found


def _outcome(call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """What a reward function gives, or what it raises: also to leave the program."""
    try:
        found = call()
        if inspect.isawaitable(found):
            found = asyncio.run_coroutine_threadsafe(
                _awaited(found, _torch_modes()), _event_loop()
            ).result()
        return found, None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and _is_main():
            raise  # of the person
        return None, error


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _outcome_within(seconds: float, call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """The outcome of a call in a thread, which is left to itself after its time."""
    outcome: list[Any] = []
    modes = _torch_modes()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        if device is not None:
            torch.cuda.set_device(device)  # which is one of the thread
        with modes():
            outcome.extend(_outcome(call))

    # A daemon: the program ends though the function does not.
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(run,), name="reward", daemon=True)
    # Where a function does not let go of the interpreter nothing else in it can run, and this ends
    # the program with a trace of its threads.
    faulthandler.dump_traceback_later(seconds + _GRACE, exit=True, file=sys.__stderr__)
    try:
        thread.start()
        thread.join(seconds)
    finally:
        faulthandler.cancel_dump_traceback_later()
    late = TimeoutError(f"has not ended within {seconds:g} s; raise reward_seconds if it may")
    return tuple(outcome) if outcome else (None, late)


def _own(value: Any) -> Any:
    """The value with its lists and dicts copied, and those in them."""
    if isinstance(value, list):
        return [_own(item) for item in value]
    if isinstance(value, dict):
        return {key: _own(item) for key, item in value.items()}
    return value


def _scores(function: Reward, given: dict[str, Any], seconds: float) -> list[float]:
    name, count = _name(function), len(given["completions"])
    named = _parameters(function)
    if named is not None:
        given = {key: value for key, value in given.items() if key in named}
    # What one function changes in place neither training nor the next function sees.
    call = functools.partial(function, **_own(given))
    found, error = _outcome_within(seconds, call) if seconds else _outcome(call)
    if error is not None:
        trace = traceback.extract_tb(error.__traceback__)
        where = f" ({trace[-1].filename}, line {trace[-1].lineno})" if trace else ""
        problem = f"raised {type(error).__name__}: {error}{where}"
        raise RewardError(f"reward {name}: {problem}.") from error
    found = found.tolist() if hasattr(found, "tolist") else found
    is_list = isinstance(found, Sequence)
    if not is_list or len(found) != count:
        got = len(found) if is_list else f"a {type(found).__name__}"
        remedy = "Return a list with one number per completion, None for no score."
        raise RewardError(f"reward {name}: expected {count} scores, got {got}. {remedy}")
    return [number(value, f"reward {name}, completion {i}") for i, value in enumerate(found)]


def load_rewards(names: str | list[str]) -> list[Reward]:
    """Functions by their names, ``package.module:function``, with commas or in a list.

    Modules are looked for in the working directory as well.

    Raises:
        ConfigError: a name has another form, its module fails, or it stands for no function.
    """
    functions = []
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in items(names):
        expected = f"reward: expected package.module:function, got {name!r}"
        try:
            function = pkgutil.resolve_name(name)
        except (Exception, SystemExit) as error:  # whatever importing it does
            raise ConfigError(f"{expected} ({type(error).__name__}: {error}).") from error
        if not callable(function):
            raise ConfigError(f"{expected}, which is a {type(function).__name__}.")
        functions.append(function)
    return functions
