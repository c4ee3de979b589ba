"""TRL's fused LM head on fastpo: DPO, KTO, GRPO, RLOO and SFT trainers, switched by one line.

Every TRL trainer with a fused LM head scores tokens by one function, looked up by name at each
call. ``enable`` puts an object of the same signature under that name and ``disable`` puts TRL's own
back:

    import fastpo.integrations.trl
    print(fastpo.integrations.trl.enable())

The losses stay TRL's; only per-token statistics and their gradients come from fastpo. Trainers made
before or after the switch are both served.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from fastpo.integrations import IntegrationError
from fastpo.linear import linear_token_stats

_MODULE, _NAME = "trl.trainer.utils", "_ChunkedLogProbFunction"
_PARAMETERS = (
    "ctx",
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
# TRL releases whose function was compared with this one: from the first up to before the last.
_TESTED = ((1, 15), (1, 17))
_MOMENTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

# TRL's own function while ours stands in its place, else None.
_original: Any = None


class ChunkedLogProb:
    """The stand-in for TRL's ``ChunkedLogProbFunction``: only ``apply`` is used."""

    @staticmethod
    def apply(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _MOMENTS,
    ) -> tuple[torch.Tensor | None, ...]:
        """Per-token statistics in TRL's order; None where not in ``outputs``.

        Args:
            hidden: [N, H].
            weight: [V, H], cast to the type of hidden where autocast does not cast both.
            bias: [V] or None.
            targets: [N] int64.
            temperature: divides the logits.
            chunk_size: the width of TRL's tiles; fastpo bounds its workspace in bytes instead.
            final_logit_softcapping: bounds the logits by a tanh; None for none.
            logit_scale: multiplies the logits before the soft-cap.
            outputs: any of ``entropy``, ``log_sum_sq_probs``, ``mean_logits``, ``is_top1``; the
                log-probs are always computed.

        Returns:
            ``(log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1)``: float32 (float64 for
            float64 hidden states), the last one bool.
        """
        weight, bias = (_held(head) for head in (weight, bias))
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)
        names = tuple(name for name in _MOMENTS if name in outputs)
        stats = linear_token_stats(
            hidden,
            weight,
            targets,
            bias,
            outputs=("logprobs", *names),
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=final_logit_softcapping,
        )
        return stats.logprobs, *(getattr(stats, name) for name in _MOMENTS)


def _held(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """A head parameter that is still whole in backward.

    DeepSpeed ZeRO-3 gathers the head around the forward alone and then empties the parameter, not
    its storage. A view keeps the gathered values until backward, which for a head comes next.
    """
    return parameter.view_as(parameter) if hasattr(parameter, "ds_id") else parameter


def _version(module: ModuleType) -> tuple[int, int]:
    parts = module.__version__.split(".")
    try:
        return int(parts[0]), int(parts[1])
    except (ValueError, IndexError):
        raise _refusal(f"TRL's version {module.__version__!r} cannot be read") from None


def _refusal(reason: str) -> IntegrationError:
    (first, last) = (".".join(map(str, bound)) for bound in _TESTED)
    remedy = (
        f"Install a tested release (trl>={first},<{last}), or train without "
        "fastpo.integrations.trl: TRL's own kernel stays in place."
    )
    return IntegrationError(f"fastpo.integrations.trl: {reason}. {remedy}")


def _utils() -> ModuleType:
    """TRL's module that holds the name, of a tested version."""
    try:
        trl = importlib.import_module("trl")
    except ImportError as error:
        raise _refusal(f"TRL does not import ({error})") from error
    if not _TESTED[0] <= _version(trl) < _TESTED[1]:
        raise _refusal(f"TRL {trl.__version__} was never tested")
    return importlib.import_module(_MODULE)


def _check(found: Any, version: str) -> None:
    """Refuse anything but TRL's own function with the signature this module was written for."""
    if found is None:
        raise _refusal(f"TRL {version} has no {_MODULE}.{_NAME} (TRL 1.15 needs Triton for it)")
    owner = getattr(found, "__module__", None) or type(found).__module__
    if owner.partition(".")[0] != "trl":
        raise IntegrationError(
            f"fastpo.integrations.trl: {_MODULE}.{_NAME} was already replaced by {owner}. "
            "Undo that patch first, or leave this switch off: only one of the two can serve TRL."
        )
    names = tuple(inspect.signature(found.forward).parameters)
    if names != _PARAMETERS:
        raise _refusal(f"{_NAME} of TRL {version} takes {names}, expected {_PARAMETERS}")


def enable() -> str:
    """Let TRL's trainers score tokens by fastpo, until ``disable``. Twice is the same as once.

    Returns:
        One line that says what is replaced, in which TRL.

    Raises:
        IntegrationError: no TRL, a version that was never tested, another signature, or a name that
            somebody else has replaced. Nothing is changed then.
    """
    global _original
    utils = _utils()
    version = importlib.import_module("trl").__version__
    found = getattr(utils, _NAME, None)
    if found is not ChunkedLogProb:
        _check(found, version)
        _original = found
        setattr(utils, _NAME, ChunkedLogProb)
    return f"fastpo serves {_MODULE}.{_NAME} of TRL {version}"


def disable() -> None:
    """Put TRL's own function back. Nothing happens if it is in place.

    Raises:
        IntegrationError: somebody has replaced fastpo's object since.
    """
    global _original
    if _original is None:
        return
    utils = importlib.import_module(_MODULE)
    found = getattr(utils, _NAME, None)
    if found is not ChunkedLogProb:
        owner = getattr(found, "__module__", None) or type(found).__module__
        raise IntegrationError(
            f"fastpo.integrations.trl: {_MODULE}.{_NAME} was replaced by {owner} after enable(). "
            "Undo that patch first; then call disable() again."
        )
    setattr(utils, _NAME, _original)
    _original = None


@contextmanager
def enabled() -> Iterator[str]:
    """``enable`` for the block, then as it was before.

    Raises:
        IntegrationError: as ``enable`` and ``disable``.

    Example:
        >>> with fastpo.integrations.trl.enabled() as report:  # doctest: +SKIP
        ...     print(report)
        ...     trainer.train()
    """
    was_enabled = _original is not None
    report = enable()
    try:
        yield report
    finally:
        if not was_enabled:
            disable()
