"""The op behind ``fastpo.linear_divergence``: two models' hidden states and heads to divergences.

Two torch ops, ``fastpo::linear_divergence`` and ``fastpo::linear_divergence_backward``, each one
node in a graph. Their bodies are the loops of :mod:`fastpo.divergence_plans`.
"""

from __future__ import annotations

from fastpo import divergence_plans
from fastpo.ops._library import Gradient, register
from fastpo.ops.scale_rows import scale_rows
from fastpo.tiles import accumulation_dtype

_MODELS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, "
    "Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias"
)
_INPUTS = (
    f"{_MODELS}, Tensor? mask, float lora_scale, float scale, float softcap, float temperature, "
    "str kind, float alpha, int workspace_bytes"
)
_TENSORS = 8  # of the models, the ones that may want a gradient
_HIDDEN, _REF_HIDDEN = 0, 5


def _fake(*arguments):
    hidden, weight, ref_hidden = arguments[_HIDDEN], arguments[1], arguments[_REF_HIDDEN]
    unit_grads, rows_to_save = arguments[-2:]
    N, acc = hidden.shape[0], accumulation_dtype(hidden.dtype)
    return (
        hidden.new_empty((N,), dtype=acc),
        hidden.new_empty((6, N), dtype=acc),
        *(
            x.new_empty((N if wanted else 0, x.shape[1]), dtype=acc)
            for x, wanted in zip((hidden, ref_hidden), unit_grads, strict=True)
        ),
        hidden.new_empty((rows_to_save, 2, divergence_plans.padded(weight.shape[0])), dtype=acc),
    )


def _fake_backward(*arguments):
    return tuple(
        t.new_empty(t.shape) if needed else arguments[0].new_empty((0,))
        for t, needed in zip(arguments[:_TENSORS], arguments[-1], strict=True)
    )


linear_divergence_backward = register(
    f"linear_divergence_backward({_INPUTS}, Tensor rows, Tensor saved_logits, "
    "Tensor grad_divergences, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    divergence_plans.backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output) -> None:
    _, rows, *units, saved_logits = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    *tensors, mask = inputs[: _TENSORS + 1]
    *ctx.scalars, unit_grads, _ = inputs[_TENSORS + 1 :]
    ctx.frozen = any(unit_grads)
    if ctx.frozen:
        ctx.dtypes = [tensors[i].dtype for i in (_HIDDEN, _REF_HIDDEN)]
        ctx.save_for_backward(*units)
    else:
        ctx.save_for_backward(*tensors, mask, rows, saved_logits)


def _backward(ctx, grad_divergences, *_):
    grads = [None] * (_TENSORS + 1 + len(ctx.scalars) + 2)
    if grad_divergences is None:
        return tuple(grads)
    grad_divergences = grad_divergences.contiguous()
    if ctx.frozen:
        # The gradient is known up to the row's factor, whatever the loss was.
        sides = zip((_HIDDEN, _REF_HIDDEN), ctx.saved_tensors, ctx.dtypes, strict=True)
        for i, unit, dtype in sides:
            if ctx.needs_input_grad[i]:
                grads[i] = scale_rows(unit, grad_divergences, dtype)
        return tuple(grads)
    *inputs, rows, saved_logits = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:_TENSORS])
    found = linear_divergence_backward(
        *inputs, *ctx.scalars, rows, saved_logits, grad_divergences, needs
    )
    for i, grad in enumerate(found):
        grads[i] = grad if needs[i] else None
    return tuple(grads)


linear_divergence = register(
    f"linear_divergence({_INPUTS}, bool[] unit_grads, SymInt rows_to_save) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    divergence_plans.forward,
    _fake,
    Gradient(_setup_context, _backward),
)
