"""Token values to one value per sequence: sums, means, counts and log-ratios.

Sequences are the rows of padded values [B, T], with a mask, or the pieces of packed values [N]
between the cumulative lengths ``cu_seqlens`` [B + 1]. Packed values may have a mask as well; a
token counts if it lies in a sequence and in the mask. Results are float32, or float64 for float64
values. Positions that do not count contribute exactly 0 and get exactly 0 gradient, even where the
value is NaN or infinite. Results may be differentiated any number of times, in reverse mode.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.checks import check_operands, check_tensors, fail
from fastpo.ops.segment_sums import check, segment_sums
from fastpo.tiles import accumulation_dtype


def _offsets(function: str, cu_seqlens: Tensor | None) -> Tensor | None:
    if cu_seqlens is not None and cu_seqlens.dtype not in (torch.int32, torch.int64):
        remedy = "Cast it with .to(torch.int64)."
        raise fail(function, "cu_seqlens", "int32 or int64", f"{cu_seqlens.dtype}", remedy)
    return None if cu_seqlens is None else cu_seqlens.long()


def _sums_and_counts(
    function: str,
    values: Tensor,
    reference: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    optional = {"reference": reference, "mask": mask, "cu_seqlens": cu_seqlens, "weights": weights}
    check_operands(function, optional, values=values)
    offsets = _offsets(function, cu_seqlens)
    if reference is not None and reference.dtype != values.dtype:
        common = torch.promote_types(values.dtype, reference.dtype)
        values, reference = values.to(common), reference.to(common)
    if weights is not None:
        weights = weights.to(accumulation_dtype(values.dtype))
    check(function, values, reference, weights, mask, offsets)
    return segment_sums(values, reference, weights, mask, offsets)


def sequence_sums(
    values: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Weighted sum of token values over each sequence.

    sums_b = sum_t weights_t values_t, over the tokens of sequence b that are in the mask. Log-probs
    of tokens (nats) become log-probs of responses.

    Args:
        values: [B, T], or packed [N] with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        mask: bool, shape of ``values``; True where a token counts. All tokens if not given.
        cu_seqlens: [B + 1] int32 or int64 cumulative lengths, rising within [0, N]. They are
            checked on the CPU only; elsewhere the check would have to wait for the device.
        weights: shape of ``values``, any float dtype; 1 if not given.

    Returns:
        [B] float32, or float64 for float64 values; 0 for an empty sequence. Differentiable in
        ``values`` and ``weights``; deterministic.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or ``cu_seqlens`` falls.

    Example:
        >>> logps = torch.tensor([[-1.0, -2.0, -4.0], [-0.5, -8.0, 0.0]])
        >>> mask = torch.tensor([[True, True, True], [True, False, False]])
        >>> sequence_sums(logps, mask)
        tensor([-7.0000, -0.5000])
        >>> sequence_sums(logps.flatten(), cu_seqlens=torch.tensor([0, 2, 6]))
        tensor([ -3.0000, -12.5000])
    """
    return _sums_and_counts("sequence_sums", values, None, mask, cu_seqlens, weights)[0]


def sequence_means(
    values: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Weighted sum of token values over each sequence, divided by its number of tokens.

    means_b = sums_b / max(count_b, 1): weights scale the terms, they do not enter the divisor.

    Args:
        values: as in :func:`sequence_sums`.
        mask: as in :func:`sequence_sums`.
        cu_seqlens: as in :func:`sequence_sums`.
        weights: as in :func:`sequence_sums`.

    Returns:
        [B] float32, or float64 for float64 values; 0 for an empty sequence. Differentiable in
        ``values`` and ``weights``; deterministic.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or ``cu_seqlens`` falls.

    Example:
        >>> logps = torch.tensor([[-1.0, -2.0], [-0.5, -8.0]])
        >>> sequence_means(logps, torch.tensor([[True, True], [True, False]]))
        tensor([-1.5000, -0.5000])
    """
    sums_B, counts_B = _sums_and_counts("sequence_means", values, None, mask, cu_seqlens, weights)
    return sums_B / counts_B.clamp(min=1)


def sequence_counts(mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Number of tokens of each sequence.

    Args:
        mask: bool [B, T], or packed [N] with ``cu_seqlens``; True where a token counts.
        cu_seqlens: [B + 1] int32 or int64 cumulative lengths, rising within [0, N].

    Returns:
        [B] int64.

    Raises:
        ValueError: neither is given, or shapes, dtypes or devices do not fit.

    Example:
        >>> sequence_counts(torch.tensor([[True, True], [True, False]]))
        tensor([2, 1])
        >>> sequence_counts(cu_seqlens=torch.tensor([0, 2, 6]))
        tensor([2, 4])
    """
    check_operands("sequence_counts", {"mask": mask, "cu_seqlens": cu_seqlens})
    offsets = _offsets("sequence_counts", cu_seqlens)
    if mask is not None:
        values = mask.float()
        check("sequence_counts", values, None, None, mask, offsets)
        return segment_sums(values, None, None, mask, offsets)[1]
    if offsets is None:
        remedy = "Without both, a sequence has no length."
        raise fail("sequence_counts", "mask, cu_seqlens", "at least one of them", "None", remedy)
    return offsets.diff()


def sequence_log_ratios(
    policy: Tensor,
    reference: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Weighted sum over each sequence of the differences between two sets of token log-probs.

    log_ratios_b = sum_t weights_t (policy_t - reference_t), in nats. The difference is formed per
    token, before the sum, so that no digits are lost between two long sums.

    Args:
        policy: token log-probs [B, T], or packed [N] with ``cu_seqlens``; float32, bfloat16,
            float16 or float64.
        reference: shape of ``policy``, any of these dtypes; the narrower of the two is widened. It
            gets a gradient if it asks for one.
        mask: as in :func:`sequence_sums`.
        cu_seqlens: as in :func:`sequence_sums`.
        weights: as in :func:`sequence_sums`.

    Returns:
        [B] float32, or float64 for float64 values; 0 for an empty sequence. Differentiable in
        ``policy``, ``reference`` and ``weights``; deterministic.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or ``cu_seqlens`` falls.

    Example:
        >>> policy, reference = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.75]])
        >>> sequence_log_ratios(policy, reference)
        tensor([0.2500])
    """
    check_tensors("sequence_log_ratios", policy=policy, reference=reference)
    function = "sequence_log_ratios"
    return _sums_and_counts(function, policy, reference, mask, cu_seqlens, weights)[0]
