"""Divergences of logits that exist already: one kernel forward, one backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastpo import backends
from fastpo.ops._library import Gradient, register
from fastpo.tiles import Tile, accumulation_dtype


def _matrices(*tensors: torch.Tensor) -> Iterator[tuple[slice, tuple[torch.Tensor, ...]]]:
    """Which of the B T rows, and the same [n, V] views of [B, T, V] tensors.

    One if every row stride allows, else B: ``logits[:, :-1]`` does not, and is not copied.
    """
    B, T, V = tensors[0].shape
    try:
        yield slice(0, B * T), tuple(t.view(B * T, V) for t in tensors)
    except RuntimeError:
        for b in range(B):
            yield slice(b * T, (b + 1) * T), tuple(t[b] for t in tensors)


def _tiles(*logits_nv, scale, softcap, temperature) -> list[Tile]:
    no_targets = torch.empty(0, dtype=torch.int64, device=logits_nv[0].device)
    return [Tile(x_nv, no_targets, 0, None, scale, softcap, temperature) for x_nv in logits_nv]


def _forward(logits, ref_logits, mask, scale, softcap, temperature, kind, alpha):
    (B, T, _), device = logits.shape, logits.device
    acc = accumulation_dtype(logits.dtype)
    divergences_BT = torch.zeros((B, T), dtype=acc, device=device)
    divergences_N = divergences_BT.view(-1)
    rows_RN = torch.zeros((6, B * T), dtype=acc, device=device)
    transform = {"scale": scale, "softcap": softcap, "temperature": temperature}
    kernels = backends.kernels(device)
    for rows, pair in _matrices(logits, ref_logits):
        if pair[0].shape[0]:
            tiles, out_n = _tiles(*pair, **transform), divergences_N[rows]
            kernels.divergence(*tiles, rows_RN[:, rows], out_n, kind=kind, alpha=alpha)
    if mask is not None:
        divergences_BT.masked_fill_(~mask, 0)
    return divergences_BT, rows_RN


def _backward_op(
    logits, ref_logits, mask, scale, softcap, temperature, kind, alpha, rows_RN, grads, needs
):
    if mask is not None:
        grads = torch.where(mask, grads, 0.0)
    grads_N = grads.reshape(-1).contiguous()
    inputs = (logits, ref_logits)
    outs = [
        torch.empty(t.shape if need else (0,), dtype=t.dtype, device=t.device)
        for t, need in zip(inputs, needs, strict=True)
    ]
    # An output stands in for one that is not needed, to be cut as the logits are.
    wanted = [out if need else t for t, out, need in zip(inputs, outs, needs, strict=True)]
    transform = {"scale": scale, "softcap": softcap, "temperature": temperature}
    kernels = backends.kernels(logits.device)
    for rows, (logits_nv, ref_nv, *out) in _matrices(*inputs, *wanted):
        if logits_nv.shape[0]:
            grad_nv = [o if need else None for o, need in zip(out, needs, strict=True)]
            kernels.divergence_grad(
                *_tiles(logits_nv, ref_nv, **transform), rows_RN[:, rows], grads_N[rows], *grad_nv,
                kind=kind, alpha=alpha,
            )  # fmt: skip
    return tuple(outs)


_INPUTS = (
    "Tensor logits, Tensor ref_logits, Tensor? mask, float scale, float softcap, "
    "float temperature, str kind, float alpha"
)

logits_divergence_backward = register(
    f"logits_divergence_backward({_INPUTS}, Tensor rows, Tensor grad_divergences, bool[] needs) "
    "-> (Tensor, Tensor)",
    _backward_op,
    lambda logits, ref_logits, *rest: tuple(
        torch.empty(t.shape if need else (0,), dtype=t.dtype, device=t.device)
        for t, need in zip((logits, ref_logits), rest[-1], strict=True)
    ),
)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, scale, softcap, temperature, kind, alpha = inputs
    ctx.scalars = (scale, softcap, temperature, kind, alpha)
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_divergences, _):
    *inputs, rows = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    grads = logits_divergence_backward(*inputs, *ctx.scalars, rows, grad_divergences, needs)
    found = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    return *found, *(None,) * 6


logits_divergence = register(
    f"logits_divergence({_INPUTS}) -> (Tensor, Tensor)",
    _forward,
    lambda logits, *_: (
        logits.new_empty(logits.shape[:2], dtype=accumulation_dtype(logits.dtype)),
        logits.new_empty(
            (6, logits.shape[0] * logits.shape[1]), dtype=accumulation_dtype(logits.dtype)
        ),
    ),
    Gradient(_setup_context, _backward, public="divergence"),
)
