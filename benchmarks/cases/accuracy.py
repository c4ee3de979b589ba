"""Errors against float64 of the same inputs: log-probs, their sum over a sequence, gradients.

The gradient of a confident token is a difference of nearly equal vectors, so its relative error is
shown by the probability of the target.
"""

from __future__ import annotations

import itertools

import torch
import workload

CONFIDENCES = (0.5, 0.9, 0.99, 0.999, 0.9999)
_TOKENS = 128  # per confidence


def run(options, found, write) -> None:
    dtypes = options.dtype or ("bfloat16",)
    heads = options.head or ("frozen", "trained")
    for v, dtype, head in itertools.product(options.v or [32768], dtypes, heads):
        sizes = workload.Sizes(
            options.n or 1024, options.h or 1024, v, dtype, head, options.device, 0.0
        )
        random = workload.make(sizes)
        exact = workload.truth(random)
        confident = {p: _confident(sizes, p) for p in CONFIDENCES}
        confident_exact = {p: workload.truth(inputs) for p, inputs in confident.items()}
        for provider in (p for p in found if p.serves(head)):
            line = {"case": "accuracy", "provider": provider.name, **sizes._asdict()}
            del line["device"]
            try:
                got = workload.step(provider.logprobs, random)
                report = workload.errors(got, exact)
                report["logprob_sum"] = abs((got[0].double().sum() - exact[0].sum()).item())
                report["dhidden_by_confidence"] = {
                    str(p): _row_error(workload.step(provider.logprobs, inputs)[1], wanted[1])
                    for (p, inputs), wanted in zip(
                        confident.items(), confident_exact.values(), strict=True
                    )
                }
                line["errors"] = report
            except Exception as error:
                line["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            write(line)


def _row_error(got_NH: torch.Tensor, want_NH: torch.Tensor) -> float:
    """Median over the tokens of the relative error of their gradient."""
    return ((got_NH.double() - want_NH).norm(dim=1) / want_NH.norm(dim=1)).median().item()


def _confident(sizes: workload.Sizes, p: float) -> workload.Inputs:
    """Tokens whose target has about probability `p` (about: the inputs are rounded).

    Each hidden state is moved along its target's row of the head by as much as that needs, found by
    bisection in float64.
    """
    inputs = workload.make(sizes._replace(n=_TOKENS), seed=3)
    hidden_NH, weight_VH = inputs.hidden_NH.detach().double(), inputs.weight_VH.detach().double()
    targets_N1 = inputs.targets_N[:, None]
    direction_NH = weight_VH[inputs.targets_N]
    direction_NH = direction_NH / direction_NH.norm(dim=1, keepdim=True)
    start_NV, slope_NV = hidden_NH @ weight_VH.t(), direction_NH @ weight_VH.t()
    low_N1 = torch.full_like(targets_N1, -100, dtype=torch.float64)
    high_N1 = -low_N1
    for _ in range(40):
        middle_N1 = (low_N1 + high_N1) / 2
        logp_N1 = (start_NV + middle_N1 * slope_NV).log_softmax(-1).gather(1, targets_N1)
        below_N1 = logp_N1.exp() < p
        low_N1 = torch.where(below_N1, middle_N1, low_N1)
        high_N1 = torch.where(below_N1, high_N1, middle_N1)
    moved_NH = (hidden_NH + low_N1 * direction_NH).to(inputs.hidden_NH.dtype).requires_grad_()
    return inputs._replace(hidden_NH=moved_NH, upstream_N=torch.ones_like(inputs.upstream_N))
