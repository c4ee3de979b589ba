"""What the recipes share: one signature, one loop."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from fastpo.trainers.checkpoints import locked
from fastpo.trainers.rounds import OuterLoop

_COMMON = """
    Args:
        model: a causal LM, or a ``PeftModel`` around one; trained in place.
        tokenizer: of the model.
        prompts: texts or lists of chat messages, or rows with ``prompt`` and further fields; or a
            function from the round to these.
        score: called with prompts [B] and responses [B][K]; gives rewards [B, K] or preferences
            [B, K, K].
        output: folder of the run.
        **options: of :class:`fastpo.trainers.rounds.OuterLoop`: ``samples``, ``max_new_tokens``,
            ``training``, ``seed``, ``resume``, ...

    Returns:
        The metrics of every round. The model is also saved in ``output/model``.
"""


def recipe(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., list[dict]]]:
    """Turn ``body(loop, **own options)`` into a recipe; ``defaults`` are of ``OuterLoop``.

    The section ``Options`` of its docstring becomes part of the recipe's ``Args``.
    """

    def wrap(body: Callable[..., None]) -> Callable[..., list[dict]]:
        parameters = inspect.signature(body).parameters
        own = {name: p for name, p in parameters.items() if name != "loop"}

        @functools.wraps(body)
        def run(model, tokenizer, prompts, score=None, *, output, **options):
            given = {name: options.pop(name, p.default) for name, p in own.items()}
            # A run may be made longer.
            settings = {"recipe": body.__name__} | {k: given[k] for k in given if k != "rounds"}
            with locked(output):
                loop = OuterLoop(
                    model, tokenizer, prompts, score, output=output, settings=settings,
                    **defaults | options,
                )  # fmt: skip
                body(loop, **given)
            return loop.history

        make = inspect.Parameter
        outer = [make(n, make.POSITIONAL_OR_KEYWORD) for n in ("model", "tokenizer", "prompts")]
        outer.append(make("score", make.POSITIONAL_OR_KEYWORD, default=None))
        outer.append(make("output", make.KEYWORD_ONLY))
        rest = make("options", make.VAR_KEYWORD)
        run.__signature__ = inspect.Signature([*outer, *own.values(), rest])
        head, _, extra = inspect.getdoc(body).partition("\nOptions:\n")
        common = inspect.cleandoc(_COMMON).replace(
            "    **options", f"{extra}\n    **options" if extra else "    **options"
        )
        run.__doc__ = f"{head.rstrip()}\n\n{common}"
        return run

    return wrap
