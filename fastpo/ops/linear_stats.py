"""The op behind ``fastpo.linear``: hidden states and a head weight to per-token statistics.

Two torch ops, ``fastpo::linear_stats`` and ``fastpo::linear_stats_backward``, each one node in a
graph. Their bodies are the loops of :mod:`fastpo.plans`; here are the schema, the shapes and the
autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastpo import plans
from fastpo.ops._library import Gradient, register
from fastpo.ops.scale_rows import scale_rows
from fastpo.tiles import MOMENTS, accumulation_dtype


class Stats(NamedTuple):
    """What the op returns, [N] each in the accumulation dtype; empty where not asked for."""

    logprobs: torch.Tensor
    lse: torch.Tensor
    lse_low: torch.Tensor  # what rounding took from lse
    entropy: torch.Tensor
    log_sum_sq_probs: torch.Tensor
    mean_logits: torch.Tensor
    is_top1: torch.Tensor
    unit_grad: torch.Tensor  # [N, H] d logprobs / d hidden, with keep_unit_grad
    saved_logits: torch.Tensor  # [N, saved_columns]


_HEAD = (
    "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? lora_a, Tensor? lora_b, "
    "float lora_scale, float scale, float softcap, float temperature, int ignore_index, "
    "int workspace_bytes"
)


def _fake(hidden, weight, targets, *rest):
    moments, keep_unit_grad, saved_columns = rest[-3:]
    N, H = hidden.shape
    acc = accumulation_dtype(hidden.dtype)

    def rows(wanted=True, dtype=acc):
        return hidden.new_empty((N if wanted else 0,), dtype=dtype)

    return (
        *(rows() for _ in range(3)),
        *(
            rows(bool(moments & bit), torch.bool if name == "is_top1" else acc)
            for name, bit in MOMENTS.items()
        ),
        hidden.new_empty((N, H) if keep_unit_grad else (0, H), dtype=acc),
        hidden.new_empty((N if saved_columns else 0, saved_columns), dtype=acc),
    )


def _fake_backward(hidden, weight, targets, bias, lora_a, lora_b, *rest):
    needs = rest[-1]
    inputs = (hidden, weight, bias, lora_a, lora_b)
    return tuple(
        t.new_empty(t.shape) if needed else hidden.new_empty((0,))
        for t, needed in zip(inputs, needs, strict=True)
    )


linear_stats_backward = register(
    f"linear_stats_backward({_HEAD}, Tensor logprobs, Tensor lse, Tensor lse_low, Tensor entropy, "
    "Tensor saved_logits, Tensor? grad_logprobs, Tensor? grad_lse, Tensor? grad_entropy, "
    "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    plans.backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, targets, bias, lora_a, lora_b, *scalars = inputs
    stats = Stats(*output)
    ctx.set_materialize_grads(False)
    ctx.scalars = scalars[:-3]
    ctx.keep_unit_grad = scalars[-2]
    # Clones of what users see, who may write into it.
    logprobs, lse, entropy = (x.clone() for x in (stats.logprobs, stats.lse, stats.entropy))
    kept = (logprobs, lse, stats.lse_low, entropy, stats.unit_grad, stats.saved_logits)
    ctx.save_for_backward(hidden, weight, targets, bias, lora_a, lora_b, *kept)
    ctx.mark_non_differentiable(stats.lse_low, *stats[4:])


def _backward(ctx, grad_logprobs, grad_lse, _, grad_entropy, *__):
    hidden, weight, targets, bias, lora_a, lora_b, *values = ctx.saved_tensors
    *forward, unit_grad, saved_logits = values
    nothing = (None,) * len(ctx.scalars)
    grads = [None if g is None else g.contiguous() for g in (grad_logprobs, grad_lse, grad_entropy)]
    if all(g is None for g in grads):
        return (None,) * 6 + nothing + (None,) * 3
    if ctx.keep_unit_grad and grads[1] is None and grads[2] is None:
        # Frozen head: the gradient is known up to the row's factor, whatever the loss was.
        return scale_rows(unit_grad, grads[0], hidden.dtype), *(None,) * 5, *nothing, *(None,) * 3
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 3, 4, 5)]
    dX, dW, db, dA, dB = linear_stats_backward(
        hidden, weight, targets, bias, lora_a, lora_b, *ctx.scalars,
        *forward, saved_logits, *grads, needed,
    )  # fmt: skip
    found = [g if need else None for g, need in zip((dX, dW, db, dA, dB), needed, strict=True)]
    return found[0], found[1], None, *found[2:], *nothing, *(None,) * 3


linear_stats = register(
    f"linear_stats({_HEAD}, int moments, bool keep_unit_grad, SymInt saved_columns) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    plans.forward,
    _fake,
    Gradient(_setup_context, _backward, public="linear_token_stats"),
)
