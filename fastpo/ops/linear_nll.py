"""Negative log-likelihood with a trained head: the token gradient is known in forward, so 3 passes.

A block of rows holds its whole vocabulary at once: when the block's lse is final the gradient of
its logits is formed in place and multiplied, and nothing is recomputed.
"""

from __future__ import annotations

import torch

from fastpo import backends, plans
from fastpo.ops._library import Gradient, register, transformed
from fastpo.tiles import RowState, accumulation_dtype


def tile_rows(hidden_NH: torch.Tensor, vocab: int, workspace_bytes: int) -> int:
    """Rows of whole logits the workspace holds."""
    return workspace_bytes // (plans.logit_bytes(hidden_NH.dtype, hidden_NH.device) * vocab)


def _linear_nll(
    hidden, weight, targets, bias, factors, scale, softcap, temperature, ignore_index,
    rows_per_tile, needs_hidden, needs_weight, needs_bias,
):  # fmt: skip
    """``sum_t factors_t * nll_t`` and its gradients by hidden, weight and bias."""
    (N, H), device = hidden.shape, hidden.device
    head = plans.Head(hidden, weight, bias, None, None, 1.0, scale, softcap, temperature)
    kernels = backends.kernels(device)
    dX_NH = torch.zeros((N if needs_hidden else 0, H), dtype=hidden.dtype, device=device)
    # The wrapper only comes here when this sum over blocks is exact in fp32 or has one term.
    dW_VH = torch.zeros((head.vocab if needs_weight else 0, H), dtype=head.acc, device=device)
    db_V = torch.zeros(head.vocab if needs_bias else 0, dtype=head.acc, device=device)
    keep_N = (targets != ignore_index) & (factors != 0)
    rows = plans.Rows(plans.kept(keep_N), N, keep_N)
    n_max = max(min(rows_per_tile, rows.count), 1)
    logits = torch.empty((n_max, head.vocab), dtype=head.acc, device=device)
    dlogits = (
        logits if head.compute == head.acc else logits.new_empty(logits.shape, dtype=head.compute)
    )
    logprobs_n = torch.empty(rows.count, dtype=head.acc, device=device)
    factors_n = rows.take_all(factors)
    weight_VH = head.weight(0, head.vocab)

    for first, last in plans.spans(0, rows.count, n_max):
        n, block = last - first, slice(first, last)
        hidden_nH = rows.take_to_sum(hidden, first, last).to(head.compute)
        targets_n = rows.take(targets, first, last)
        head.logits(hidden_nH, None, weight_VH, 0, logits[:n])
        tile = head.tile(logits[:n], targets_n, 0, ignore_index)
        state = RowState.start(n, head.acc, device, moments=0)
        kernels.chunk_stats(tile, state)
        lse_n, low_n = (torch.empty_like(logprobs_n[block]) for _ in range(2))
        kernels.finish_stats(
            state, targets_n, vocab=head.vocab, ignore_index=ignore_index,
            logprobs=logprobs_n[block], lse=lse_n, lse_low=low_n,
        )  # fmt: skip
        kernels.chunk_grad(
            tile, dlogits[:n], logprobs=logprobs_n[block], lse=lse_n, lse_low=low_n,
            grad_logprobs=-factors_n[block],
        )  # fmt: skip
        if needs_hidden:
            dhidden_nH = torch.empty((n, H), dtype=head.acc, device=device)
            plans.multiply(dlogits[:n], weight_VH, dhidden_nH, add=False)
            rows.scatter(dhidden_nH, dX_NH, first, last)
        if needs_weight:
            plans.multiply(dlogits[:n].t(), hidden_nH, dW_VH, add=first > 0)
        if needs_bias:
            db_V += dlogits[:n].sum(0, dtype=head.acc)
    loss = -(factors_n * logprobs_n).sum()
    return loss, dX_NH, dW_VH.to(weight.dtype), db_V


def _fake(
    hidden, weight, targets, bias, factors, scale, softcap, temperature, ignore_index,
    rows_per_tile, needs_hidden, needs_weight, needs_bias,
):  # fmt: skip
    acc = accumulation_dtype(hidden.dtype)
    (N, H), V = hidden.shape, weight.shape[0]
    return (
        hidden.new_empty((), dtype=acc),
        hidden.new_empty((N if needs_hidden else 0, H)),
        weight.new_empty((V if needs_weight else 0, H)),
        hidden.new_empty(V if needs_bias else 0, dtype=acc),
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.needed = inputs[-3:]
    ctx.bias_dtype = None if inputs[3] is None else inputs[3].dtype


def _backward(ctx, grad_loss, *_):
    gradients = ctx.saved_tensors
    traced = torch.compiler.is_compiling() or type(grad_loss) is not torch.Tensor
    if traced or transformed():
        scaled = [g * grad_loss for g in gradients]
    else:
        # In place: a second [V, H] would be the largest tensor of the step. torch's version counter
        # turns a second backward into an error.
        scaled = [g.mul_(grad_loss) for g in gradients]
    dX, dW, db = (g if need else None for g, need in zip(scaled, ctx.needed, strict=True))
    db = None if db is None else db.to(ctx.bias_dtype)
    return dX, dW, None, db, *(None,) * 9


linear_nll = register(
    "linear_nll(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor factors, "
    "float scale, float softcap, float temperature, int ignore_index, int rows_per_tile, "
    "bool needs_hidden, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    _linear_nll,
    _fake,
    Gradient(_setup_context, _backward),
)
