"""The inputs of one measurement, one step on them, and their float64 truth."""

from __future__ import annotations

from typing import NamedTuple

import torch
from providers import IGNORE

HEADS = ("no-grad", "frozen", "trained")


class Sizes(NamedTuple):
    """One shape to measure; `ignored` is the share of tokens whose target is ignored."""

    n: int
    h: int
    v: int
    dtype: str
    head: str
    device: str
    ignored: float = 0.5

    @property
    def active(self) -> int:
        return self.n - int(self.n * self.ignored)

    @property
    def one_pass(self) -> int:
        """Floating-point operations of one product over the active tokens."""
        return 2 * self.active * self.h * self.v


class Inputs(NamedTuple):
    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor
    targets_N: torch.Tensor
    upstream_N: torch.Tensor


def make(sizes: Sizes, seed: int = 0) -> Inputs:
    """Logits of standard deviation 3, as of a trained model, and arbitrary upstream gradients."""
    generator = torch.Generator(sizes.device).manual_seed(seed)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator, device=sizes.device, dtype=dtype)

    dtype = getattr(torch, sizes.dtype)
    hidden_NH = normal(sizes.n, sizes.h).to(dtype)
    weight_VH = normal(sizes.v, sizes.h, dtype=dtype).mul_(3 * sizes.h**-0.5)
    targets_N = torch.randint(sizes.v, (sizes.n,), generator=generator, device=sizes.device)
    order_N = torch.randperm(sizes.n, generator=generator, device=sizes.device)
    targets_N[order_N[sizes.active :]] = IGNORE
    hidden_NH.requires_grad_(sizes.head != "no-grad")
    weight_VH.requires_grad_(sizes.head == "trained")
    return Inputs(hidden_NH, weight_VH, targets_N, normal(sizes.n))


def step(logprobs, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Log-probs and the gradients the head asks for: one forward and, if any, one backward."""
    hidden_NH, weight_VH, targets_N, upstream_N = inputs
    leaves = [t for t in (hidden_NH, weight_VH) if t.requires_grad]
    with torch.set_grad_enabled(bool(leaves)):
        logps_N = logprobs(hidden_NH, weight_VH, targets_N)
    if not leaves:
        return (logps_N,)
    grads = torch.autograd.grad(logps_N, leaves, upstream_N.to(logps_N.dtype))
    return logps_N.detach(), *grads


def truth(inputs: Inputs, rows: int = 128) -> tuple[torch.Tensor, ...]:
    """What `step` computes, in float64 from the same inputs, `rows` tokens at a time."""
    hidden_NH, weight_VH, targets_N, upstream_N = (t.detach() for t in inputs)
    weight64_VH = weight_VH.double()
    logps_N = torch.zeros(len(targets_N), dtype=torch.float64, device=targets_N.device)
    dhidden_NH = torch.zeros_like(hidden_NH, dtype=torch.float64)
    needs_weight = inputs.weight_VH.requires_grad
    dweight_VH = torch.zeros_like(weight64_VH) if needs_weight else None
    for index_n in (targets_N != IGNORE).nonzero()[:, 0].split(rows):
        hidden_nH, target_n1 = hidden_NH[index_n].double(), targets_N[index_n, None]
        dlogits_nV = (hidden_nH @ weight64_VH.t()).log_softmax(-1)
        logps_N[index_n] = dlogits_nV.gather(1, target_n1)[:, 0]
        if not inputs.hidden_NH.requires_grad:
            continue
        dlogits_nV.exp_().neg_()
        # 1 - p as the sum of the others: by difference it has no digits where p is near 1.
        dlogits_nV.scatter_(1, target_n1, 0.0)
        dlogits_nV.scatter_(1, target_n1, -dlogits_nV.sum(1, keepdim=True))
        dlogits_nV *= upstream_N[index_n, None].double()
        dhidden_NH[index_n] = dlogits_nV @ weight64_VH
        if needs_weight:
            dweight_VH.addmm_(dlogits_nV.t(), hidden_nH)
    grads = [] if not inputs.hidden_NH.requires_grad else [dhidden_NH]
    return (logps_N, *grads, *([dweight_VH] if needs_weight else []))


def errors(got: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """Root mean square error of the log-probs (nats) and relative errors of the gradients."""
    difference_N = got[0].double() - exact[0]
    active = (exact[0] != 0).sum().clamp(min=1)
    report = {
        "logprob_rms": (difference_N.square().sum() / active).sqrt().item(),
        "logprob_max": difference_N.abs().max().item(),
    }
    for name, grad, want in zip(("dhidden", "dweight"), got[1:], exact[1:], strict=False):
        report[name] = ((grad.double() - want).norm() / want.norm()).item()
    return report


def wrong(report: dict[str, float], dtype: str) -> str:
    """Why a result is not worth timing: errors far beyond rounding; an empty string if none is."""
    limit = 1e-3 if dtype == "float32" else 0.1
    found = [f"{k} {v:.2g}" for k, v in report.items() if k != "logprob_max" and not v < limit]
    return f"wrong result: {', '.join(found)} (limit {limit})" if found else ""
