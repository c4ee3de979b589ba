"""Time, products and error of the mean divergence from a teacher, forward and backward.

Teacher and student have heads of their own. Liger's loss is the Jensen-Shannon divergence of its
fused distillation with no weight on the labels; it makes both gradients in forward, so a frozen
head pays for a gradient of the weight.
"""

from __future__ import annotations

import importlib
import itertools
from functools import partial
from typing import NamedTuple

import measure
import torch
import workload
from torch.nn import functional as F

import fastpo

KINDS = ("forward_kl", "js")
_ROWS = 128  # of the float64 truth at a time


class Models(NamedTuple):
    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor
    ref_hidden_NH: torch.Tensor
    ref_weight_VH: torch.Tensor


def _log_probs(models: Models, dtype: torch.dtype) -> list[torch.Tensor]:
    logits = (F.linear(*models[:2]), F.linear(*models[2:]))
    return [x.to(dtype).log_softmax(-1) for x in logits]


def _plain(kind: str, models: Models, dtype=torch.float32) -> torch.Tensor:
    """Logits, a copy in float32, log-softmax of both, and the formula."""
    log_p, log_q = _log_probs(models, dtype)
    if kind == "forward_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).log()
    return ((p * (log_p - log_m) + q * (log_q - log_m)) / 2).sum(-1).mean()


def _kl_div(kind: str, models: Models) -> torch.Tensor:
    """As TRL's `generalized_jsd_loss`, on log-softmaxes in float32."""
    log_p, log_q = _log_probs(models, torch.float32)
    divergence = partial(F.kl_div, reduction="none", log_target=True)
    if kind == "forward_kl":
        return divergence(log_p, log_q).sum(-1).mean()
    half = torch.tensor(0.5).log()
    log_m = torch.logsumexp(torch.stack([log_p + half, log_q + half]), dim=0)
    return ((divergence(log_m, log_p) + divergence(log_m, log_q)) / 2).sum(-1).mean()


def _fastpo(kind: str, models: Models) -> torch.Tensor:
    return fastpo.linear_divergence(*models, kind=kind).mean()


def _liger(kind: str, models: Models) -> torch.Tensor:
    module = importlib.import_module("liger_kernel.chunked_loss")
    on_gpu = models.hidden_NH.is_cuda
    loss = module.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=on_gpu
    )
    labels_N = torch.zeros(len(models.hidden_NH), dtype=torch.int64, device=models.hidden_NH.device)
    return loss(*models, labels_N)


_PROVIDERS = {"plain": _plain, "kl-div": _kl_div, "fastpo": _fastpo, "liger": _liger}


def run(options, found, write) -> None:
    dtypes, heads = options.dtype or ("float32",), options.head or ("frozen", "trained")
    for v, dtype, kind in itertools.product(options.v or [32768], dtypes, KINDS):
        shape = (options.n or 256, options.h or 1024, v, dtype)
        models = [_make(workload.Sizes(*shape, "trained", options.device, 0.0), i) for i in (0, 1)]
        exact = _truth(kind, models[0])
        for head in heads:
            sizes = workload.Sizes(*shape, head, options.device, 0.0)
            _measure(kind, sizes, models, exact, options, write)


def _make(sizes: workload.Sizes, seed: int) -> Models:
    """A teacher that differs from the student by a tenth of it."""
    student, other = (workload.make(sizes, 2 * seed + i) for i in (0, 1))
    near = [(own + 0.1 * noise).detach() for own, noise in zip(student[:2], other[:2], strict=True)]
    return Models(*student[:2], *near)


def _truth(kind: str, models: Models) -> tuple[torch.Tensor, ...]:
    """The loss and both gradients in float64."""
    wide = Models(*(t.detach().double() for t in models))
    weight_VH = wide.weight_VH.requires_grad_()
    value, parts, dweight_VH = 0.0, [], torch.zeros_like(weight_VH)
    for start in range(0, len(wide.hidden_NH), _ROWS):
        rows = slice(start, start + _ROWS)
        hidden_nH = wide.hidden_NH[rows].requires_grad_()
        block = Models(hidden_nH, weight_VH, wide.ref_hidden_NH[rows], wide.ref_weight_VH)
        share = len(hidden_nH) / len(wide.hidden_NH)
        loss = _plain(kind, block, torch.float64) * share
        dhidden_nH, dweight = torch.autograd.grad(loss, (hidden_nH, weight_VH))
        value += loss.item()
        parts.append(dhidden_nH)
        dweight_VH += dweight
    return torch.tensor(value, dtype=torch.float64), torch.cat(parts), dweight_VH


def _step(function, kind: str, models: Models, head: str) -> tuple[torch.Tensor, ...]:
    wanted = (head != "no-grad", head == "trained")
    leaves = [t.requires_grad_(want) for t, want in zip(models[:2], wanted, strict=True)]
    leaves = [t for t in leaves if t.requires_grad]
    with torch.set_grad_enabled(bool(leaves)):
        loss = function(kind, models)
    return loss.detach(), *(torch.autograd.grad(loss, leaves) if leaves else ())


def _measure(kind, sizes, models, exact, options, write) -> None:
    runs, lines = {}, {}
    for name, function in _PROVIDERS.items():
        if (name == "liger" and kind != "js") or (name != "kl-div" and name not in options.peers):
            continue
        line = {"case": f"divergence {kind}", "provider": name, **sizes._asdict()}
        del line["device"]  # the machine's own name stands in the record
        try:
            got = _step(function, kind, models[0], sizes.head)
            line["errors"] = _errors(got, exact)
            line["wrong"] = workload.wrong(line["errors"], sizes.dtype)
            if not line["wrong"]:
                products = measure.flops(lambda f=function: _step(f, kind, models[0], sizes.head))
                line["passes"] = products / sizes.one_pass
        except Exception as error:  # a peer that fails is a result too
            line["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        if line.get("wrong") or line.get("error"):
            write(line)
            continue
        lines[name] = line
        runs[name] = lambda i, f=function: _step(f, kind, models[i % 2], sizes.head)
    if runs:
        times = measure.rounds(runs, options.repeats, sizes.device)
        for name, line in lines.items():
            write({**line, **measure.summary(times[name], times.get("plain"))})


def _errors(got, exact) -> dict[str, float]:
    """Relative errors of the loss and of the gradients."""
    names = ("loss", "dhidden", "dweight")
    return {
        name: ((x.double() - want).norm() / want.norm()).item()
        for name, x, want in zip(names, got, exact, strict=False)
    }
