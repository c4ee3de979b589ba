"""The op behind ``fastpo.diffusion``'s errors and step log-probs: tensors to errors per sample.

The op gives sums of w d^2 (or its pseudo-Huber form) of the residuals d that ``csrc/fastpo.h``
defines, per sample and candidate, or per index of a dimension as well. Predictions get gradients,
in one more sweep; targets, reference, scales, weights and mask do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo import backends
from fastpo.operands import PART_ELEMENTS, SCALED_FIELDS, SCALES, Residuals
from fastpo.ops._layout import rows_segments_columns
from fastpo.ops._library import Gradient, register
from fastpo.tiles import accumulation_dtype

_FIELDS = (*SCALED_FIELDS, "reference")
_INPUTS = Residuals._fields[:-1]
_SCHEMA = ", ".join(
    f"Tensor{'' if name in ('prediction', 'target') else '?'} {name}" for name in _INPUTS
)


def accumulation_of(*fields: Tensor | None) -> torch.dtype:
    """float64 if one of the fields is, else float32."""
    dtypes = [accumulation_dtype(field.dtype) for field in fields if field is not None]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _acc(inputs: Residuals) -> torch.dtype:
    return accumulation_of(*(getattr(inputs, name) for name in _FIELDS))


def _views(
    inputs: Residuals, segment_dim: int, outputs: list[Tensor]
) -> tuple[Residuals, list[Tensor], list[Tensor]]:
    """What the kernels take: the inputs, then outputs of the prediction's shape, also as views.

    All are copied, the outputs made anew, where no views serve all layouts at once.
    """
    # One candidate is a field as the others are; the rest lie at a stride from it.
    given = inputs._asdict() | {"target": inputs.target[:, 0]}
    fields = {
        name: given[name] for name in (*_FIELDS, "weights", "mask") if given[name] is not None
    }
    tensors = [*fields.values(), *outputs]
    views = rows_segments_columns(tensors, segment_dim)
    if views is None:
        dense = {name: getattr(inputs, name).contiguous() for name in fields}
        return _views(inputs._replace(**dense), segment_dim, [x.contiguous() for x in outputs])
    placed = dict(zip(fields, views, strict=False))
    target, K = placed["target"], inputs.target.shape[1]
    placed["target"] = inputs.target.as_strided(
        (target.shape[0], K, *target.shape[1:]),
        (target.stride(0), inputs.target.stride(1), *target.stride()[1:]),
    )
    scales = {name: getattr(inputs, name) for name in SCALES}
    placed |= {name: scale.contiguous() for name, scale in scales.items() if scale is not None}
    return inputs._replace(**placed), outputs, views[len(fields) :]


def _empty(inputs: Residuals, segment_dim: int) -> tuple[Tensor, Tensor]:
    sizes = tuple(inputs.target.shape[:2])
    if segment_dim >= 0:
        sizes += (inputs.prediction.shape[segment_dim],)
    errors = inputs.prediction.new_empty(sizes, dtype=_acc(inputs))
    return errors, errors.new_empty(sizes if inputs.reference is not None else (0,))


def _noise_errors(*arguments):
    *tensors, segment_dim, huber = arguments
    inputs = Residuals(*tensors, huber)
    if not inputs.target.numel():
        errors, reference_errors = _empty(inputs, segment_dim)
        return errors.zero_(), reference_errors.zero_()
    views, _, _ = _views(inputs, segment_dim, [])
    N, K, A, S, I = views.target.shape
    parts = -(-A * I // PART_ELEMENTS)
    sums_NKSP = inputs.prediction.new_empty((N, K, S, parts), dtype=_acc(inputs))
    with_reference = inputs.reference is not None
    reference_sums_NKSP = torch.empty_like(sums_NKSP) if with_reference else None
    backends.kernels(inputs.prediction.device).noise_errors(
        views, sums_NKSP=sums_NKSP, reference_sums_NKSP=reference_sums_NKSP
    )
    dims = (-1,) if segment_dim >= 0 else (-2, -1)
    if not with_reference:
        return sums_NKSP.sum(dims), sums_NKSP.new_empty((0,))
    return sums_NKSP.sum(dims), reference_sums_NKSP.sum(dims)


def _fake(*arguments):
    *tensors, segment_dim, huber = arguments
    return _empty(Residuals(*tensors, huber), segment_dim)


def _empty_grads(inputs: Residuals, needs: list[bool]) -> list[Tensor]:
    """Laid out as the predictions where those are dense; without elements where not needed."""
    return [
        torch.empty_like(field) if needed else inputs.prediction.new_empty((0,))
        for field, needed in zip(inputs[:2], needs, strict=True)
    ]


def _noise_errors_backward(grad_errors, *arguments):
    *tensors, segment_dim, huber, needs = arguments
    inputs = Residuals(*tensors, huber)._replace(reference=None)
    grads = _empty_grads(inputs, needs)
    if not inputs.target.numel():
        return tuple(grad.zero_() for grad in grads)
    wanted = [grad for grad, needed in zip(grads, needs, strict=True) if needed]
    views, written, outputs = _views(inputs, segment_dim, wanted)
    N, K, _, S, _ = views.target.shape
    coefficients_NKS = grad_errors if segment_dim >= 0 else grad_errors[:, :, None]
    placed = iter(outputs)
    names = ("grad_prediction", "grad_second_prediction")
    backends.kernels(inputs.prediction.device).noise_errors_backward(
        views,
        coefficients_NKS.expand(N, K, S),
        **{
            name: next(placed) if needed else None
            for name, needed in zip(names, needs, strict=True)
        },
    )
    for grad, copy in zip(wanted, written, strict=True):
        if copy is not grad:
            grad.copy_(copy)
    return tuple(grads)


_backward_op = register(
    f"noise_errors_backward(Tensor grad_errors, {_SCHEMA}, int segment_dim, float huber,"
    " bool[] needs) -> (Tensor, Tensor)",
    _noise_errors_backward,
    lambda grad_errors, *arguments: tuple(
        _empty_grads(Residuals(*arguments[:-3], arguments[-2]), arguments[-1])
    ),
)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, segment_dim, huber = inputs
    tensors[_INPUTS.index("reference")] = None  # its errors are constants
    ctx.save_for_backward(*tensors)
    ctx.settings = segment_dim, huber
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_errors, _):
    nothing = (None,) * len(_INPUTS)
    needs = list(ctx.needs_input_grad[:2])
    if grad_errors is None or not any(needs):
        return *nothing, None, None
    grads = _backward_op(grad_errors, *ctx.saved_tensors, *ctx.settings, needs)
    found = [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]
    return *found, *nothing[2:], None, None


_op = register(
    f"noise_errors({_SCHEMA}, int segment_dim, float huber) -> (Tensor, Tensor)",
    _noise_errors,
    _fake,
    Gradient(_setup_context, _backward, public="diffusion.noise_errors"),
)


def noise_errors(inputs: Residuals, segment_dim: int = -1) -> tuple[Tensor, Tensor | None]:
    """Sums [N, K], or [N, K, S] over all but ``segment_dim``, of the prediction and the reference.

    Fields are [N, ...], of one shape, the target [N, K, ...]; weights and mask have the shape of
    the prediction.
    """
    *tensors, huber = inputs
    errors, reference_errors = _op(*tensors, segment_dim, huber)
    return errors, reference_errors if inputs.reference is not None else None
