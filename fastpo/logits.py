"""Log-probs of given tokens from logits that are there already."""

from __future__ import annotations

import torch

from fastpo.checks import check_operands, fail
from fastpo.ops import _check
from fastpo.ops.logits_logprobs import logits_logprobs


def logprobs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
) -> torch.Tensor:
    """``log_softmax(z, -1).gather(-1, targets)`` in one read of the logits, with no buffer.

    ``z = softcap * tanh(logit_scale * logits / softcap) / temperature``. Where the logits need not
    exist, :func:`fastpo.linear_logprobs` costs less. The gradient is the only derivative: a second
    one and forward mode are errors.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64; rows may have any stride (a slice
            such as ``logits[:, :-1]`` is not copied).
        targets: [...] int64 token ids, ``ignore_index`` for tokens to skip.
        temperature: divides the logits.
        logit_scale: multiplies them, before the soft-cap.
        softcap: bounds them by a tanh; None for none.
        ignore_index: the target of tokens to skip.
        inplace_backward: write the gradient over the logits, which saves a tensor of their size.
            Nobody else may need them in backward; torch raises an error if somebody does.

    Returns:
        [...] float32 (float64 for float64 logits), nats; 0 at ignored tokens.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on a CPU a target out of range (on a
            GPU it gives NaN at its token).

    Example:
        >>> import torch, fastpo
        >>> logits = torch.randn(2, 5, 100)
        >>> fastpo.logprobs(logits[:, :-1], torch.randint(100, (2, 4))).shape
        torch.Size([2, 4])
    """
    op = "logprobs"
    check_operands(op, logits=logits, targets=targets)
    _check.check_float(op, "logits", logits)
    if logits.dim() < 2 or logits.shape[-1] == 0:
        expected = "[..., V] with V > 0"
        remedy = "Add a dimension with logits[None]."
        raise fail(op, "logits", expected, str(tuple(logits.shape)), remedy)
    _check.check_shape(op, "targets", targets, tuple(logits.shape[:-1]), "logits without V")
    _check.check_targets(op, targets, logits.shape[-1], ignore_index)
    transform = _check.check_transform(op, logit_scale, softcap, temperature)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    shape = targets.shape
    if logits.dim() == 2:
        logits, targets = logits[None], targets[None]
    elif logits.dim() > 3:
        logits, targets = logits.flatten(0, -3), targets.flatten(0, -2)
    values, *_ = logits_logprobs(logits, targets, *transform, ignore_index, inplace_backward)
    return values.view(shape)
