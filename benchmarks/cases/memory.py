"""Peak memory of one step at sizes where plain logits hurt, without timing it properly.

`first_ms` is a single cold step: enough to see an order of magnitude, not to compare.
"""

from __future__ import annotations

import itertools

import measure
import torch
import workload


def run(options, found, write) -> None:
    dtypes = options.dtype or ("bfloat16",)
    heads = options.head or ("frozen", "trained")
    ignored = 0.0 if options.ignored is None else options.ignored
    for v, dtype, head in itertools.product(options.v or [32768, 152064], dtypes, heads):
        sizes = workload.Sizes(
            options.n or 2048, options.h or 1024, v, dtype, head, options.device, ignored
        )
        for provider in found:
            if not provider.serves(head):
                continue
            line = {"case": "memory", "provider": provider.name, "mode": "forward+backward"}
            line |= sizes._asdict()
            del line["device"]
            write(line | _peak(provider, sizes))


def _peak(provider, sizes) -> dict:
    if sizes.device == "cpu":
        return measure.peak_cpu(provider.name, sizes, torch.get_num_threads())
    inputs = workload.make(sizes)
    try:
        workload.step(provider.logprobs, inputs)  # kernels are loaded and compiled
        torch.cuda.empty_cache()
        return measure.peak_cuda(lambda: workload.step(provider.logprobs, inputs))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
