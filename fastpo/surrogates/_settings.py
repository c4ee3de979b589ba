"""From the name of a method and overrides to checked settings of the op."""

from __future__ import annotations

import math
from dataclasses import asdict

from fastpo.operands import CORRECTIONS, KL_KINDS, RATIO_LEVELS, SURROGATE_KINDS, Surrogate
from fastpo.ops._check import fail
from fastpo.surrogates.presets import PRESETS, Preset

# Settings that only some kinds read.
_KINDS_OF = {
    "clip_low": ("clip", "cispo", "gmpo", "value"),
    "clip_high": ("clip", "cispo", "gmpo", "value"),
    "delta": ("clip",),
    "dual_clip": ("clip",),
    "level": ("clip", "cispo", "sapo"),
    "tau_positive": ("sapo",),
    "tau_negative": ("sapo",),
    "k_positive": ("vespo",),
    "lambda_positive": ("vespo",),
    "k_negative": ("vespo",),
    "lambda_negative": ("vespo",),
    "unbiased_kl": ("clip", "cispo", "sapo", "reinforce", "vespo"),
}
_CHOICES = {
    "kind": SURROGATE_KINDS,
    "level": RATIO_LEVELS,
    "kl": KL_KINDS,
    "correction": CORRECTIONS,
}
# Settings that are read where a choice is not "none".
_READ_BY = {
    "correction": ("correct_sequence", "sampler_min", "sampler_max"),
    "kl": ("beta", "kl_max", "unbiased_kl"),
}
_REMEDIES = {
    "correction": "Choose how ratios out of bounds are corrected.",
    "kl": "Pass ref_logprobs, whose kl is k3 if not chosen.",
}
_DEFAULTS = asdict(Surrogate())
_FLAGS = ("unbiased_kl", "correct_sequence")
# Numbers: smallest allowed value, whether it is allowed itself, whether infinity is.
_RANGES = {
    "clip_low": (0.0, True, True),
    "clip_high": (0.0, True, True),
    "delta": (0.0, False, True),
    "dual_clip": (1.0, False, True),
    "tau_positive": (0.0, False, False),
    "tau_negative": (0.0, False, False),
    "k_positive": (0.0, True, False),
    "lambda_positive": (0.0, True, False),
    "k_negative": (0.0, True, False),
    "lambda_negative": (0.0, True, False),
    "log_ratio_max": (0.0, False, True),
    "beta": (0.0, True, False),
    "kl_max": (0.0, False, True),
    "sampler_min": (0.0, True, False),
    "sampler_max": (0.0, False, True),
    "off_policy_max": (-math.inf, True, True),
}


def preset_of(function: str, method: str) -> Preset:
    """The preset of a name."""
    if method not in PRESETS:
        remedy = "Pick one; a setting of its own overrides the preset's."
        raise fail(function, "method", f"one of {', '.join(PRESETS)}", repr(method), remedy)
    return PRESETS[method]


def _check_values(function: str, settings: Surrogate) -> None:
    for name, choices in _CHOICES.items():
        value = getattr(settings, name)
        if value not in choices:
            expected = f"one of {', '.join(choices)}"
            raise fail(function, name, expected, repr(value), "Pick one of them.")
    for name in _FLAGS:
        value = getattr(settings, name)
        if not isinstance(value, bool):
            raise fail(function, name, "True or False", repr(value), "")
    for name, (least, inclusive, unbounded) in _RANGES.items():
        value = getattr(settings, name)
        low_enough = value < math.inf or unbounded
        if not (low_enough and (value >= least if inclusive else value > least)):
            word = "at least" if inclusive else "above"
            expected = f"a number {word} {least:g}" + ("" if unbounded else ", finite")
            raise fail(function, name, expected, repr(value), "")


def _numbers(function: str, options: dict) -> dict[str, float]:
    for name, value in options.items():
        if name in _RANGES and not isinstance(value, (int, float)):
            raise fail(function, name, "a number", repr(value), "Call .item() on a tensor.")
    return {name: float(value) for name, value in options.items() if name in _RANGES}


def resolve(
    function: str, preset: Preset, options: dict, tensors: tuple[str, ...] = ()
) -> Surrogate:
    """Settings of the preset with the options that are given, checked one by one and together.

    ``tensors`` names the settings that are given as tensors, besides ``options``.

    Raises:
        ValueError: an option is unknown, out of range, not read by the kind of loss, or at odds
            with another.
    """
    for name in options:
        if name not in _DEFAULTS:
            expected = f"settings among {', '.join(_DEFAULTS)}"
            raise fail(function, "settings", expected, name, "Check the spelling.")
    settings = preset.settings.with_options(**(options | _numbers(function, options)))
    _check_values(function, settings)
    for name, kinds in _KINDS_OF.items():
        is_default = getattr(settings, name) == _DEFAULTS[name]
        is_given = name in tensors or (name in options and not is_default)
        if is_given and settings.kind not in kinds:
            expected = f"a loss of kind {' or '.join(kinds)}"
            remedy = "Leave it out, or choose another method."
            raise fail(function, name, expected, f"kind {settings.kind}", remedy)
    if settings.level != "token" and settings.kind not in _KINDS_OF["level"]:
        expected, got = "token for a kind without such a ratio", f"{settings.level!r}"
        raise fail(function, "level", expected, got, f"{settings.kind} has none to choose.")
    if settings.sampler_min > settings.sampler_max:
        got = f"{settings.sampler_min} and {settings.sampler_max}"
        raise fail(function, "sampler_min, sampler_max", "in rising order", got, "Swap them.")
    for name, reads in _READ_BY.items():
        unread = [n for n in reads if getattr(settings, n) != _DEFAULTS[n]]
        if getattr(settings, name) == "none" and unread:
            expected = f"one of {', '.join(_CHOICES[name][1:])}, for {' and '.join(unread)}"
            raise fail(function, name, expected, "none", _REMEDIES[name])
    return settings
