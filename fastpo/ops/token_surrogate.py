"""The op behind ``fastpo.surrogates``: tokens to a loss per sequence, its gradient and metrics.

The forward writes the derivative of each sequence's loss once; the backward scales it by the
upstream gradient of the sequence. Inputs and settings are those of ``fastpo.operands``, one after
the other.
"""

from __future__ import annotations

from dataclasses import fields
from itertools import chain

import torch
from torch import Tensor

from fastpo import backends
from fastpo.operands import SURROGATE_ROWS, Surrogate, SurrogateInputs
from fastpo.ops._library import Gradient, register
from fastpo.ops.segment_sums import dense_rows, segment_sums_backward
from fastpo.tiles import accumulation_dtype

_TENSORS = len(SurrogateInputs._fields)
_LOSS = SURROGATE_ROWS.index("loss")
# One list of settings per type: what torch does for autograd takes time in the square of the number
# of arguments, a millisecond if every setting is one.
_TYPES = ("str", "float", "bool")
_SETTINGS = {kind: [f.name for f in fields(Surrogate) if f.type == kind] for kind in _TYPES}


def _schema() -> str:
    optional = ", ".join(
        f"Tensor{'' if name in ('logprobs', 'advantages') else '?'} {name}"
        for name in SurrogateInputs._fields
    )
    settings = ", ".join(f"{kind}[] {kind}_settings" for kind in _TYPES)
    return (
        f"token_surrogate({optional}, Tensor? mask, Tensor? offsets, bool needs_grads, {settings})"
        " -> (Tensor, Tensor, Tensor)"
    )


def setting_lists(settings: Surrogate) -> list[list[str | float | bool]]:
    """The settings as the op takes them."""
    return [[getattr(settings, name) for name in _SETTINGS[kind]] for kind in _TYPES]


def _settings(lists: list[list[str | float | bool]]) -> Surrogate:
    named = (zip(_SETTINGS[kind], x, strict=True) for kind, x in zip(_TYPES, lists, strict=True))
    return Surrogate(**dict(chain.from_iterable(named)))


def _empty(logprobs: Tensor, offsets: Tensor | None, needs_grads: bool) -> tuple[Tensor, ...]:
    acc = accumulation_dtype(logprobs.dtype)
    B = logprobs.shape[0] if offsets is None else offsets.shape[0] - 1
    grads_shape = logprobs.shape if needs_grads else (0,)
    return (
        logprobs.new_empty((B,), dtype=acc),
        logprobs.new_empty((len(SURROGATE_ROWS), B), dtype=acc),
        logprobs.new_empty(grads_shape, dtype=acc),
    )


def _token_surrogate(*arguments):
    inputs = SurrogateInputs(*map(dense_rows, arguments[:_TENSORS]))
    mask, offsets, needs_grads, *settings = arguments[_TENSORS:]
    _, rows_RB, grads = _empty(inputs.logprobs, offsets, needs_grads)
    if offsets is not None:
        grads.zero_()  # the kernel leaves positions between sequences alone
    backends.kernels(inputs.logprobs.device).token_surrogate(
        inputs,
        _settings(settings),
        mask=dense_rows(mask),
        offsets=None if offsets is None else offsets.contiguous(),
        rows_RB=rows_RB,
        grads=grads if needs_grads else None,
    )
    return rows_RB[_LOSS].clone(), rows_RB, grads


def _fake(*arguments):
    _, offsets, needs_grads = arguments[_TENSORS : _TENSORS + 3]
    return _empty(arguments[0], offsets, needs_grads)


def _setup_context(ctx, inputs, output) -> None:
    _, rows_RB, grads = output
    ctx.save_for_backward(inputs[0], grads, inputs[_TENSORS + 1])
    ctx.mark_non_differentiable(rows_RB, grads)
    ctx.set_materialize_grads(False)
    ctx.inputs = len(inputs)


def _backward(ctx, grad_loss_B, *_):
    nothing = (None,) * (ctx.inputs - 1)
    if grad_loss_B is None or not ctx.needs_input_grad[0]:
        return None, *nothing
    logprobs, grads, offsets = ctx.saved_tensors
    # The derivative of a weighted sum whose weights are the derivatives kept by the forward.
    arguments = (logprobs, None, grads, None, offsets, [True, False, False])
    return segment_sums_backward(grad_loss_B, *arguments)[0], *nothing


_op = register(
    _schema(), _token_surrogate, _fake, Gradient(_setup_context, _backward, public="policy_loss")
)


def token_surrogate(
    inputs: SurrogateInputs, settings: Surrogate, mask: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Losses [B] of the sequences, differentiable in the log-probs, and the rows [15, B] of all."""
    needs_grads = inputs.logprobs.requires_grad and torch.is_grad_enabled()
    loss_B, rows_RB, _ = _op(*inputs, mask, offsets, needs_grads, *setting_lists(settings))
    return loss_B, rows_RB
