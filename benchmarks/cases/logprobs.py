"""Time, products, peak memory and error of token log-probs, forward and backward."""

from __future__ import annotations

import itertools
import math

import measure
import torch
import workload


def run(options, found, write) -> None:
    dtypes = options.dtype or ("float32", "bfloat16")
    heads = options.head or workload.HEADS
    for v, dtype, head in itertools.product(options.v or [32768], dtypes, heads):
        ignored = 0.5 if options.ignored is None else options.ignored
        _measure(
            workload.Sizes(
                options.n or 1024, options.h or 1024, v, dtype, head, options.device, ignored
            ),
            options,
            found,
            write,
        )


def _measure(sizes, options, found, write) -> None:
    # Two sets of inputs by turns: the second call of a set finds none of it in the caches.
    inputs = [workload.make(sizes, seed) for seed in (0, 1)]
    exact = workload.truth(inputs[0])
    lines, runs = {}, {}
    for provider in found:
        if not provider.serves(sizes.head):
            continue
        line = {
            "case": "logprobs",
            "provider": provider.name,
            "mode": "forward" if sizes.head == "no-grad" else "forward+backward",
            **sizes._asdict(),
        }
        del line["device"]  # the machine's own name stands in the record
        try:
            line |= _checked(provider, sizes, inputs[0], exact, options)
        except Exception as error:  # a peer that fails is a result too
            line["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        if line.get("wrong") or line.get("error"):
            write(line)
            continue
        lines[provider.name] = line
        runs[provider.name] = lambda i, p=provider: workload.step(p.logprobs, inputs[i % 2])
    del exact
    if not runs:
        return
    times = measure.rounds(runs, options.repeats, options.device)
    for name, line in lines.items():
        write({**line, **measure.summary(times[name], times.get("plain"))})


def _checked(provider, sizes, inputs, exact, options) -> dict:
    """Errors of a first step, and, if they are only rounding, its products and memory."""
    got = workload.step(provider.logprobs, inputs)
    report = workload.errors(got, exact)
    # An infinite error would not be JSON.
    line = {"errors": {k: v if math.isfinite(v) else str(v) for k, v in report.items()}}
    line["wrong"] = workload.wrong(report, sizes.dtype)
    del got
    if line["wrong"]:
        return line
    products = measure.flops(lambda: workload.step(provider.logprobs, inputs))
    line["passes"] = products / sizes.one_pass or None
    if options.no_memory:
        return line
    if sizes.device == "cuda":
        torch.cuda.empty_cache()
        return line | measure.peak_cuda(lambda: workload.step(provider.logprobs, inputs))
    peak = measure.peak_cpu(provider.name, sizes, torch.get_num_threads())
    return line | {k: peak[k] for k in ("peak_extra_bytes", "result_bytes") if k in peak}
