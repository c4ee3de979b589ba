"""Errors of a denoiser's predictions per sample, in one read of each tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpo.checks import check_operands, check_tensors, fail
from fastpo.diffusion._inputs import (
    Reduction,
    check_constant,
    check_fields,
    check_reduction,
    like_prediction,
    per_sample,
)
from fastpo.diffusion.targets import Target
from fastpo.operands import residuals
from fastpo.ops import noise_errors as op


def _check_options(
    name: str, prediction: Tensor, segment_dim: int | None, reduction: str, huber: float
) -> int:
    """The options, checked; the dimension to keep, -1 for none."""
    check_reduction(name, reduction)
    if not 0 <= huber < float("inf"):
        remedy = "0 gives squared errors."
        raise fail(name, "huber", "a finite number >= 0", repr(huber), remedy)
    if segment_dim is None:
        return -1
    if not isinstance(segment_dim, int) or not (
        0 < segment_dim % prediction.ndim and -prediction.ndim <= segment_dim < prediction.ndim
    ):
        expected = f"a dimension of {list(prediction.shape)} other than the first"
        remedy = "It is the dimension whose indices keep errors of their own, 2 in [N, C, T, H, W]."
        raise fail(name, "segment_dim", expected, repr(segment_dim), remedy)
    return segment_dim % prediction.ndim


def _counts(prediction: Tensor, mask: Tensor | None, segment_dim: int) -> Tensor | int:
    """Elements that an error is the mean of; [N] or [N, S] with a mask."""
    dims = [dim for dim in range(1, prediction.ndim) if dim != segment_dim]
    if mask is None:
        return max(math.prod([prediction.shape[dim] for dim in dims]), 1)
    # A mask of few values is counted as it is, not as the elements it stands for.
    repeats = math.prod([prediction.shape[dim] for dim in dims if mask.shape[dim] == 1])
    counts = mask.sum(dims) if dims else mask
    return (counts * repeats).clamp(min=1)


def _errors(
    name: str,
    prediction: Tensor,
    reference: Tensor | None,
    target: Tensor | Target,
    mask: Tensor | None,
    weights: Tensor | None,
    scale: Tensor | float | None,
    segment_dim: int | None,
    reduction: Reduction,
    huber: float,
) -> tuple[Tensor, Tensor | None]:
    if not isinstance(target, Target):
        if not isinstance(target, Tensor):
            got, remedy = f"a {type(target).__name__}", "Pass torch.as_tensor(target)."
            raise fail(name, "target", "a tensor or a Target", got, remedy)
        target = Target(target)
    check_tensors(name, {"mask": mask, "weights": weights})
    check_fields(name, prediction=prediction, target=target.first, second_target=target.second,
                 reference=reference)  # fmt: skip
    check_constant(name, target=target.first, second_target=target.second, weights=weights)
    segment_dim = _check_options(name, prediction, segment_dim, reduction, huber)
    check_operands(name, {"mask": mask, "weights": weights}, prediction=prediction)
    acc = op.accumulation_of(prediction, target.first, target.second, reference)
    elements = None
    if mask is not None:
        if mask.dtype != torch.bool:
            remedy = "Compare with 0 to get bool; numbers go into weights."
            raise fail(name, "mask", "torch.bool", f"{mask.dtype}", remedy)
        elements = like_prediction(name, "mask", mask, prediction)
    counts = _counts(prediction, mask, segment_dim) if reduction == "mean" else 1
    if weights is not None:
        weights = like_prediction(name, "weights", weights.to(acc), prediction)
    scales = [
        per_sample(name, argument, numbers, prediction, acc)
        for argument, numbers in (
            ("scale", scale),
            ("target.first_scale", target.first_scale),
            ("target.second_scale", target.second_scale),
        )
    ]
    scale_N, first_N, second_N = scales
    if scale_N is not None:
        first_N = scale_N if first_N is None else scale_N * first_N
        second_N = scale_N if second_N is None else scale_N * second_N
    sums, reference_sums = op.noise_errors(
        residuals(
            prediction,
            target.first[:, None],
            second_target=target.second,
            reference=None if reference is None else reference.detach(),
            prediction_scale=scale_N,
            target_scale=first_N,
            second_target_scale=second_N,
            weights=weights,
            mask=elements,
            huber=float(huber),
        ),
        segment_dim,
    )
    errors = sums.squeeze(1) / counts
    return errors, None if reference_sums is None else reference_sums.squeeze(1) / counts


def noise_errors(
    prediction: Tensor,
    target: Tensor | Target,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    scale: Tensor | float | None = None,
    segment_dim: int | None = None,
    reduction: Reduction = "mean",
    huber: float = 0.0,
) -> Tensor:
    """Squared error of each sample's prediction: one read of each tensor, no temporaries.

    e_n = mean over the elements i of the mask of w_ni (s_n (prediction_ni - target_ni))^2, the
    mean of ||eps - eps_theta||^2 that every diffusion loss starts from (arXiv:2311.12908 eq. 14;
    in code always the mean over the elements where papers write the sum). Differences and sums are
    formed in float32 (float64 if a tensor is), whatever the tensors hold. Backward writes
    2 g_n w s^2 (prediction - target) / E in one sweep, in the dtype of the prediction; the
    target, the weights and the scale get no gradient.

    Args:
        prediction: [N, ...]: latents [N, C, H, W], video [N, C, T, H, W], tokens [N, L, D], in
            any layout; float32, bfloat16, float16 or float64.
        target: the same shape in any float dtype, or one formed on the fly, see
            :mod:`fastpo.diffusion.targets`.
        mask: bool, of the prediction's dimensions with sizes of its own or 1 ([N, 1, T, H, W]).
            Elements outside are not counted and harmless, even NaN.
        weights: w, shaped like a mask. They do not enter the divisor; 0 leaves an element out.
        scale: s_n, [N] or a number, of the residual before it is squared.
        segment_dim: a dimension to keep, for errors per frame or token.
        reduction: ``mean`` over the counted elements (0 if there are none), or ``sum``.
        huber: 0, or c > 0 for sqrt(d^2 + c^2) - c in place of d^2, the pseudo-Huber error.

    Returns:
        [N], or [N, S] with ``segment_dim``; float32, or float64 if a tensor is.

    Raises:
        ValueError: a shape, dtype, device or option does not fit, or a constant has requires_grad.

    Example:
        >>> prediction = torch.tensor([[1.0, 2.0], [0.0, 1.0]], requires_grad=True)
        >>> errors = noise_errors(prediction, torch.zeros(2, 2))
        >>> errors.tolist()
        [2.5, 0.5]
        >>> errors.sum().backward()
        >>> prediction.grad.tolist()
        [[1.0, 2.0], [0.0, 1.0]]
    """
    errors, _ = _errors(
        "diffusion.noise_errors", prediction, None, target, mask, weights, scale, segment_dim,
        reduction, huber,
    )  # fmt: skip
    return errors


def noise_errors_with_reference(
    prediction: Tensor,
    reference: Tensor,
    target: Tensor | Target,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    scale: Tensor | float | None = None,
    segment_dim: int | None = None,
    reduction: Reduction = "mean",
    huber: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """:func:`noise_errors` of a prediction and of a reference's, to one target, in one launch.

    The reference gets no gradient, and is not kept for backward. Its dtype and layout may be
    others than the prediction's.

    Args:
        reference: [N, ...], the reference model's prediction.

    Other arguments and errors are those of :func:`noise_errors`.

    Returns:
        The errors of the prediction and those of the reference, the latter without gradient.

    Example:
        >>> prediction, reference = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]])
        >>> errors, reference_errors = noise_errors_with_reference(
        ...     prediction, reference, torch.zeros(1, 2))
        >>> errors.tolist(), reference_errors.tolist()
        ([2.5], [1.0])
    """
    check_tensors("diffusion.noise_errors_with_reference", reference=reference)
    return _errors(
        "diffusion.noise_errors_with_reference", prediction, reference, target, mask, weights,
        scale, segment_dim, reduction, huber,
    )  # fmt: skip
