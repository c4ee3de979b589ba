"""Log-probs from logits that exist already: one pass forward, one backward, in place if allowed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastpo import backends
from fastpo.ops._check import fail
from fastpo.ops._library import Gradient, register, transformed
from fastpo.tiles import RowState, Tile, accumulation_dtype


def _matrices(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same [rows, ...] views of [B, T, ...] tensors: one if every row stride allows, else B.

    ``logits[:, :-1]`` is the usual case that does not; a copy of it would cost what the op saves.
    """
    B, T = tensors[0].shape[:2]
    try:
        yield tuple(t.view(B * T, *t.shape[2:]) for t in tensors)
    except RuntimeError:
        yield from zip(*(t.unbind(0) for t in tensors), strict=True)


def _forward(logits, targets, scale, softcap, temperature, ignore_index):
    acc, device = accumulation_dtype(logits.dtype), logits.device
    logprobs_BT = torch.zeros(targets.shape, dtype=acc, device=device)
    lse_BT, low_BT = torch.zeros_like(logprobs_BT), torch.zeros_like(logprobs_BT)
    kernels = backends.kernels(device)
    rows = (logits, targets, logprobs_BT, lse_BT, low_BT)
    for logits_nv, targets_n, logprobs_n, lse_n, low_n in _matrices(*rows):
        if targets_n.numel() == 0:
            continue
        state = RowState.start(targets_n.shape[0], acc, device, moments=0)
        tile = Tile(logits_nv, targets_n, 0, None, scale, softcap, temperature, ignore_index)
        kernels.chunk_stats(tile, state)
        kernels.finish_stats(
            state, targets_n, vocab=logits.shape[-1], ignore_index=ignore_index,
            logprobs=logprobs_n, lse=lse_n, lse_low=low_n,
        )  # fmt: skip
    return logprobs_BT, lse_BT, low_BT


def _grad_into(
    out, logits, targets, logprobs, lse, lse_low, grad, scale, softcap, temperature, ignore_index
):
    kernels = backends.kernels(logits.device)
    for out_nv, logits_nv, targets_n, logprobs_n, lse_n, low_n, grad_n in _matrices(
        out, logits, targets, logprobs, lse, lse_low, grad
    ):
        if targets_n.numel():
            tile = Tile(logits_nv, targets_n, 0, None, scale, softcap, temperature, ignore_index)
            kernels.chunk_grad(
                tile, out_nv, logprobs=logprobs_n, lse=lse_n, lse_low=low_n,
                grad_logprobs=grad_n.contiguous(),
            )  # fmt: skip


def _grad(logits, *rest):
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _grad_into(out, logits, *rest)
    return out


def _grad_in_place(logits, *rest) -> None:
    _grad_into(logits, logits, *rest)


_TRANSFORM = "float scale, float softcap, float temperature, int ignore_index"

_ROWS = "Tensor targets, Tensor logprobs, Tensor lse, Tensor lse_low, Tensor grad_logprobs"
logits_grad = register(
    f"logits_grad(Tensor logits, {_ROWS}, {_TRANSFORM}) -> Tensor",
    _grad,
    lambda logits, *_: torch.empty(logits.shape, dtype=logits.dtype, device=logits.device),
)
logits_grad_ = register(
    f"logits_grad_(Tensor(a!) logits, {_ROWS}, {_TRANSFORM}) -> ()",
    _grad_in_place,
    lambda *_: None,
)


def _setup_context(ctx, inputs, output) -> None:
    logits, targets, *transform, ctx.inplace = inputs
    ctx.transform = transform
    if ctx.inplace and transformed():
        expected, got = "False under torch.func", "True"
        remedy = "What a transform captures must not be written into."
        raise fail("logprobs", "inplace_backward", expected, got, remedy)
    # A clone of what users see, who may write into it.
    ctx.save_for_backward(logits, targets, output[0].clone(), *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_logprobs, *_):
    logits, targets, *rows = ctx.saved_tensors
    arguments = (logits, targets, *rows, grad_logprobs, *ctx.transform)
    if ctx.inplace:
        grad = logits.detach()
        logits_grad_(grad, *arguments[1:])
        # Any later use of the logits by autograd is now an error instead of a wrong number.
        torch.autograd.graph.increment_version(grad)
    else:
        grad = logits_grad(*arguments)
    return grad, *(None,) * 6


logits_logprobs = register(
    f"logits_logprobs(Tensor logits, Tensor targets, {_TRANSFORM}, bool inplace_backward) "
    "-> (Tensor, Tensor, Tensor)",
    lambda *arguments: _forward(*arguments[:-1]),
    lambda logits, targets, *_: tuple(
        targets.new_empty(targets.shape, dtype=accumulation_dtype(logits.dtype)) for _ in range(3)
    ),
    Gradient(_setup_context, _backward, public="logprobs"),
)
