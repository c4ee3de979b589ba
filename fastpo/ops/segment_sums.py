"""The op behind ``fastpo.sequences``: token values to one sum and one count per sequence.

``fastpo::segment_sums`` and ``fastpo::segment_sums_backward`` are one graph node each. Values are
rows of [B, T], or packed [N] with ``offsets`` [B + 1], the public ``cu_seqlens``. Sums add in an
order that depends on the length of the sequence alone: the same inputs give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo import backends
from fastpo.checks import check_operands, fail
from fastpo.ops._check import check_float, check_offset_values, check_shape
from fastpo.ops._library import Gradient, register
from fastpo.tiles import accumulation_dtype

_INPUTS = "Tensor values, Tensor? reference, Tensor? weights, Tensor? mask, Tensor? offsets"


def _check_dtype(op: str, argument: str, tensor: Tensor, dtype: torch.dtype, why: str) -> None:
    if tensor.dtype != dtype:
        remedy = f"Cast it with .to({dtype})."
        raise fail(op, argument, f"{dtype} ({why})", f"{tensor.dtype}", remedy)


def check(
    op: str,
    values: Tensor,
    reference: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
) -> None:
    """Shapes, dtypes and devices of the op's inputs, under the public names of ``op``.

    Raises:
        ValueError: they do not fit.
    """
    optional = {"reference": reference, "weights": weights, "mask": mask, "cu_seqlens": offsets}
    check_operands(op, optional, values=values)
    check_float(op, "values", values)
    if values.ndim != (2 if offsets is None else 1):
        expected = "rows [B, T]" if offsets is None else "packed [N], as cu_seqlens is given"
        remedy = "Padded rows go without cu_seqlens, packed values with it."
        raise fail(op, "values", expected, f"{list(values.shape)}", remedy)
    shape, acc = tuple(values.shape), accumulation_dtype(values.dtype)
    if reference is not None:
        check_shape(op, "reference", reference, shape, "that of values")
        _check_dtype(op, "reference", reference, values.dtype, "that of values")
    if weights is not None:
        check_shape(op, "weights", weights, shape, "that of values")
        _check_dtype(op, "weights", weights, acc, f"in which {values.dtype} is summed")
    if mask is not None:
        check_shape(op, "mask", mask, shape, "that of values")
        _check_dtype(op, "mask", mask, torch.bool, "True where a token counts")
    if offsets is not None:
        _check_dtype(op, "cu_seqlens", offsets, torch.int64, "positions in values")
        if offsets.ndim != 1 or offsets.shape[0] < 1:
            remedy = "Start with 0, then add the length of each sequence."
            raise fail(op, "cu_seqlens", "shape [B + 1]", f"{list(offsets.shape)}", remedy)


def dense_rows(tensor: Tensor | None) -> Tensor | None:
    """The tensor with neighbours side by side in its last dimension; rows may lie anywhere."""
    if tensor is None or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()


def _inputs(values, reference, weights, mask, offsets) -> dict[str, Tensor | None]:
    rows = {"reference": reference, "weights": weights, "mask": mask}
    return {name: dense_rows(tensor) for name, tensor in rows.items()} | {
        "offsets": None if offsets is None else offsets.contiguous()
    }


def _empty_outputs(values: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    B = values.shape[0] if offsets is None else offsets.shape[0] - 1
    sums_B = values.new_empty((B,), dtype=accumulation_dtype(values.dtype))
    return sums_B, values.new_empty((B,), dtype=torch.int64)


def _segment_sums(values, reference, weights, mask, offsets):
    if offsets is not None:
        check_offset_values("segment_sums", offsets, values.shape[0])
    sums_B, counts_B = _empty_outputs(values, offsets)
    backends.kernels(values.device).segment_sums(
        dense_rows(values),
        **_inputs(values, reference, weights, mask, offsets),
        sums=sums_B,
        counts=counts_B,
    )
    return sums_B, counts_B


def _empty_grads(grad_sums: Tensor, values: Tensor, needs: list[bool]) -> list[Tensor]:
    """Contiguous outputs of the backward, without elements where not needed."""
    dtypes = (values.dtype, values.dtype, grad_sums.dtype)
    return [
        values.new_empty(values.shape if needed else (0,), dtype=dtype)
        for needed, dtype in zip(needs, dtypes, strict=True)
    ]


def _segment_sums_backward(grad_sums, values, reference, weights, mask, offsets, needs):
    grads = _empty_grads(grad_sums, values, needs)
    if offsets is not None:
        for grad in grads:
            grad.zero_()  # the kernel leaves positions between sequences alone
    names = ("grad_values", "grad_reference", "grad_weights")
    outputs = {
        name: grad if needed else None
        for name, grad, needed in zip(names, grads, needs, strict=True)
    }
    backends.kernels(values.device).segment_sums_backward(
        dense_rows(values),
        **_inputs(values, reference, weights, mask, offsets),
        grad_sums=grad_sums.contiguous(),
        **outputs,
    )
    return tuple(grads)


# Both ops are linear in each of their tensors, so that derivatives of any order are made of them.
def _setup_context_backward(ctx, inputs, outputs) -> None:
    *tensors, ctx.needs = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward_of_backward(ctx, grad_of_values, grad_of_reference, grad_of_weights):
    grad_sums, values, reference, weights, mask, offsets = ctx.saved_tensors
    needs_sums, needs_values, needs_reference, needs_weights = ctx.needs_input_grad[:4]
    found: list[Tensor | None] = [None] * 4
    if grad_of_values is None and grad_of_reference is not None:
        grad_of_values = torch.zeros_like(grad_of_reference)
    if grad_of_values is not None:  # of weights * grad_sums, and of the negative of it
        differences = (grad_of_values, grad_of_reference)
        if needs_sums:
            found[0] = segment_sums(*differences, weights, mask, offsets)[0]
        if needs_weights:
            inputs = (*differences, weights, mask, offsets)
            found[3] = segment_sums_backward(grad_sums, *inputs, [False, False, True])[2]
    if grad_of_weights is not None:  # of (values - reference) * grad_sums
        inputs = (values, reference, grad_of_weights, mask, offsets)
        if needs_sums:
            sums_B = segment_sums(*inputs)[0]
            found[0] = sums_B if found[0] is None else found[0] + sums_B
        if needs_values or needs_reference:
            needs = [needs_values, needs_reference, False]
            grads = segment_sums_backward(grad_sums, *inputs, needs)
            found[1:3] = [x if need else None for x, need in zip(grads[:2], needs[:2], strict=True)]
    return *found, None, None, None


segment_sums_backward = register(
    f"segment_sums_backward(Tensor grad_sums, {_INPUTS}, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _segment_sums_backward,
    lambda grad_sums, values, *rest: tuple(_empty_grads(grad_sums, values, rest[-1])),
    Gradient(_setup_context_backward, _backward_of_backward, differentiable=True),
)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_sums, _):
    needs = list(ctx.needs_input_grad[:3])
    if grad_sums is None or not any(needs):
        return (None,) * 5
    grads = segment_sums_backward(grad_sums, *ctx.saved_tensors, needs)
    found = [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]
    return *found, None, None


segment_sums = register(
    f"segment_sums({_INPUTS}) -> (Tensor, Tensor)",
    _segment_sums,
    lambda values, reference, weights, mask, offsets: _empty_outputs(values, offsets),
    Gradient(_setup_context, _backward, differentiable=True),
)
