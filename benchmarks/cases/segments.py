"""Sums of token values over sequences, padded and packed, forward and backward."""

from __future__ import annotations

import measure
import torch

import fastpo


def _plain_padded(values_BT, mask_BT, lengths_B):
    return (values_BT * mask_BT).sum(-1)


def _fastpo_padded(values_BT, mask_BT, lengths_B):
    return fastpo.sequence_sums(values_BT, mask=mask_BT)


def _plain_packed(values_N, lengths_B):
    return torch.segment_reduce(values_N, "sum", lengths=lengths_B)


def _fastpo_packed(values_N, lengths_B):
    offsets = torch.nn.functional.pad(lengths_B.cumsum(0), (1, 0))
    return fastpo.sequence_sums(values_N, cu_seqlens=offsets)


def run(options, found, write) -> None:
    """The other providers sum nothing, so only plain torch stands beside fastpo."""
    B, T, device = options.n or 512, options.h or 4096, options.device
    generator = torch.Generator().manual_seed(0)
    lengths_B = torch.randint(T // 4, T + 1, (B,), generator=generator)
    mask_BT = torch.arange(T) < lengths_B[:, None]
    values_BT = torch.randn(B, T, generator=generator)
    upstream_B = torch.randn(B, generator=generator).to(device)
    packed_N = values_BT[mask_BT]
    exact_B = (values_BT.double() * mask_BT).sum(-1)
    lengths_B, mask_BT = lengths_B.to(device), mask_BT.to(device)
    layouts = {
        "padded": ((_plain_padded, _fastpo_padded), values_BT.to(device), (mask_BT, lengths_B)),
        "packed": ((_plain_packed, _fastpo_packed), packed_N.to(device), (lengths_B,)),
    }
    for layout, (functions, values, rest) in layouts.items():
        values.requires_grad_()
        runs, lines = {}, {}
        for name, function in zip(("plain", "fastpo"), functions, strict=True):

            def step(i, function=function, values=values, rest=rest):
                sums_B = function(values, *rest)
                return sums_B, torch.autograd.grad(sums_B, values, upstream_B)[0]

            error = (step(0)[0].detach().cpu().double() - exact_B).abs().max().item()
            line = {"case": "segments", "provider": name, "mode": layout, "n": B, "h": T}
            line |= {"dtype": "float32", "errors": {"sum_max": error}}
            if not error < 1e-2:
                write(line | {"wrong": f"wrong result: {error:.2g}"})
                continue
            runs[name], lines[name] = step, line
        times = measure.rounds(runs, 4 * options.repeats, device)
        for name, line in lines.items():
            write({**line, **measure.summary(times[name], times.get("plain"))})
