"""Who computes token log-probs: one function per provider, `(hidden, weight, targets) -> logprobs`.

Targets of -100 are ignored and give 0. Every provider treats them as its own trainer does: those
that score every position and mask afterwards do so here too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

from torch.nn import functional as F

IGNORE = -100


class Provider(NamedTuple):
    """A provider, or why it is absent."""

    name: str
    logprobs: Callable | None
    why_not: str = ""

    def serves(self, head: str) -> bool:
        """Logits are saved for a trained head only; elsewhere that provider is fastpo itself."""
        return self.name != "fastpo-saved" or head == "trained"


def plain(hidden, weight, targets):
    """What a trainer without a fused head does: logits, fp32 copy, log-softmax, gather."""
    logp_NV = F.linear(hidden, weight).float().log_softmax(-1)
    logps_N = logp_NV.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    return logps_N.masked_fill(targets == IGNORE, 0)


def _fastpo():
    import fastpo

    return fastpo.linear_logprobs


def _fastpo_saved():
    """A workspace that holds all logits from forward to backward, and a tile beside them."""
    import fastpo

    def logprobs(hidden, weight, targets):
        budget = 4 * hidden.shape[0] * weight.shape[0] + (512 << 20)
        return fastpo.linear_logprobs(hidden, weight, targets, workspace_bytes=budget)

    return logprobs


def _trl():
    """TRL's kernel, called as its fused head calls it: compacted where it has Triton, else not."""
    function = importlib.import_module("trl.kernels").ChunkedLogProbFunction

    def logprobs(hidden, weight, targets):
        mask = targets != IGNORE
        rest = (1.0, 32768, None, 1.0, ("log_probs",))
        if hidden.is_cuda:
            logps = function.apply(hidden[mask], weight, None, targets[mask], *rest)[0]
            return logps.new_zeros(mask.shape).masked_scatter(mask, logps)
        logps = function.apply(hidden, weight, None, targets.clamp(min=0), *rest)[0]
        return logps.masked_fill(~mask, 0)

    return logprobs


def _torch_fused():
    options = importlib.import_module("torch.nn").LinearCrossEntropyOptions()

    def logprobs(hidden, weight, targets):
        return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)

    return logprobs


def _liger():
    name = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    function = importlib.import_module(name).LigerFusedLinearScaledCrossEntropyFunction
    return lambda hidden, weight, targets: -function.apply(hidden, weight, targets)


def _liger_triton():
    """Liger's Triton kernel; its gradients are made in forward, so each call pays for them."""
    name = "liger_kernel.ops.fused_linear_cross_entropy"
    function = importlib.import_module(name).LigerFusedLinearCrossEntropyFunction

    def logprobs(hidden, weight, targets):
        rest = (None, None, IGNORE, 0.0, 0.0, "none")
        return -function.apply(hidden, weight, targets, *rest)[0]

    return logprobs


def _cce():
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda hidden, weight, targets: -function(hidden, weight, targets, reduction="none")


def _verl():
    name = "verl.utils.experimental.torch_functional"
    function = importlib.import_module(name).FusedLinearForPPO()

    def logprobs(hidden, weight, targets):
        logps = function(hidden[None], weight, targets.clamp(min=0)[None])[0][0]
        return logps.masked_fill(targets == IGNORE, 0)

    return logprobs


_MAKERS = {
    "plain": lambda: plain,
    "fastpo": _fastpo,
    "fastpo-saved": _fastpo_saved,
    "trl": _trl,
    "torch-fused": _torch_fused,
    "liger": _liger,
    "liger-triton": _liger_triton,
    "cce": _cce,
    "verl": _verl,
}
_NEEDS_CUDA = ("liger-triton", "cce")
NAMES = tuple(_MAKERS)


def find(name: str, device: str) -> Provider:
    """The provider, or why it cannot run here."""
    if name in _NEEDS_CUDA and device != "cuda":
        return Provider(name, None, "its kernels need a GPU")
    try:
        return Provider(name, _MAKERS[name]())
    except Exception as error:  # a peer that does not import breaks in ways of its own
        return Provider(name, None, f"{type(error).__name__}: {error}".splitlines()[0])
