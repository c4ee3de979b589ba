"""Negative log-likelihood of the targets, the term that needs no upstream gradient to be known."""

from __future__ import annotations

import torch

from fastpo import linear
from fastpo.checks import fail
from fastpo.ops import _check
from fastpo.ops.linear_nll import linear_nll as _linear_nll
from fastpo.ops.linear_nll import tile_rows
from fastpo.tiles import accumulation_dtype

# Below this many rows a product reads the weight more than it multiplies, and recomputing is
# cheaper.
_FEWEST_ROWS = 256


def linear_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    weights: torch.Tensor | None = None,
    reduction: str = "mean",
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    workspace_bytes: int | None = None,
) -> torch.Tensor:
    """Cross-entropy of ``hidden @ weight.T`` with the targets, as one number, without the logits.

    ``sum_t weights_t * -log p(target_t)``, over the tokens that are not ignored; ``mean`` divides
    by the sum of their weights (their number without weights). The gradient of each token is known
    in forward, so a trained head costs 3 matrix passes where :func:`fastpo.linear_logprobs` costs
    4, if the weight is float32 or the logits fit the workspace; otherwise, and with a frozen head
    (2 passes), this *is* ``linear_logprobs``. Its backward can run once: it scales the stored
    gradients in place.

    Args:
        hidden: [..., H] float32, bfloat16, float16 or float64.
        weight: [V, H], in the type of hidden.
        targets: [...] int64, ``ignore_index`` for tokens to skip.
        bias: [V] or None.
        weights: [...] factors per token; None for ones. Where they want a gradient, this is
            ``linear_logprobs`` as well.
        reduction: ``mean`` or ``sum``.
        temperature: divides the logits.
        logit_scale: multiplies them, before the soft-cap.
        softcap: bounds them by a tanh; None for none.
        ignore_index: the target of tokens to skip.
        workspace_bytes: bound on the logits held at a time, as in
            :func:`fastpo.linear_token_stats`.

    Returns:
        [] float32 (float64 for float64 inputs), nats; 0 when every token is ignored.

    Raises:
        ValueError: arguments that do not fit, as :func:`fastpo.linear_token_stats` says.

    Example:
        >>> import torch, fastpo
        >>> hidden, weight = torch.randn(6, 16), torch.randn(100, 16, requires_grad=True)
        >>> fastpo.linear_nll(hidden, weight, torch.arange(6)).backward()
        >>> weight.grad.shape
        torch.Size([100, 16])
    """
    op = "linear_nll"
    linear.check_head(op, hidden, weight, bias, None, {"weights": weights}, targets=targets)
    if reduction not in ("mean", "sum"):
        remedy = "Take linear_logprobs for one value per token."
        raise fail(op, "reduction", "'mean' or 'sum'", repr(reduction), remedy)
    inputs = linear.prepare(op, hidden, weight, targets, bias, None, ignore_index)
    scalars = linear.scalars(
        op, hidden, temperature, logit_scale, softcap, ignore_index, workspace_bytes
    )
    acc = accumulation_dtype(inputs.hidden_NH.dtype)
    factors_N = (inputs.targets_N != ignore_index).to(acc)
    if weights is not None:
        _check.check_shape(op, "weights", weights, tuple(targets.shape), "the targets'")
        factors_N = torch.where(factors_N != 0, weights.reshape(-1).to(acc), 0.0)
    if reduction == "mean":
        total = factors_N.sum()
        factors_N = factors_N / torch.where(total == 0, 1.0, total)

    *transform, workspace_bytes = scalars
    rows = tile_rows(inputs.hidden_NH, weight.shape[0], workspace_bytes)
    one_tile = rows >= inputs.hidden_NH.shape[0]
    exact_sum = inputs.weight_VH.dtype == acc and rows >= _FEWEST_ROWS
    is_known = not factors_N.requires_grad  # else their gradient needs the log-probs
    is_trained = inputs.needs_grad() and not inputs.head_is_frozen()
    if is_known and is_trained and (one_tile or exact_sum):
        trained = (inputs.hidden_NH, inputs.weight_VH, inputs.bias_V)
        needs = [t is not None and t.requires_grad for t in trained]
        tensors = (inputs.hidden_NH, inputs.weight_VH, inputs.targets_N, inputs.bias_V, factors_N)
        return _linear_nll(*tensors, *transform, max(rows, 1), *needs)[0]
    logprobs_N = linear.run(inputs, scalars, ("logprobs",)).logprobs
    return -(factors_N * logprobs_N).sum()
