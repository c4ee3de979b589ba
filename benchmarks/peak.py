"""Peak memory of one step of one provider on the CPU, in this process alone; prints JSON."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import providers
import torch
import workload

_CLEAR_REFS, _RESET_PEAK = Path("/proc/self/clear_refs"), "5"


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise KeyError(field)


def _reset_peak() -> bool:
    """Let the kernel forget the peak so far; False where it does not offer that."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _peak_bytes(was_reset: bool) -> int:
    if was_reset:
        return _status_bytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _check(logps_N: torch.Tensor, inputs: workload.Inputs, sizes: workload.Sizes) -> dict:
    """The log-probs of 64 tokens against float64: the truth of all would take minutes here."""
    index_n = (inputs.targets_N != providers.IGNORE).nonzero()[:, 0][:64]
    few = workload.Inputs(
        inputs.hidden_NH.detach()[index_n],
        inputs.weight_VH.detach(),
        inputs.targets_N[index_n],
        inputs.upstream_N[index_n],
    )
    report = workload.errors((logps_N[index_n],), workload.truth(few))
    return {"errors": report, "wrong": workload.wrong(report, sizes.dtype)}


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    sizes = workload.Sizes(**request["sizes"])
    provider = providers.find(request["provider"], sizes.device)
    if provider.logprobs is None:
        raise SystemExit(provider.why_not)
    # Threads, the product library's buffers and the modules that a first call imports.
    workload.step(provider.logprobs, workload.make(sizes._replace(n=64, h=64, v=4096)))
    inputs = workload.make(sizes)

    was_reset = _reset_peak()
    held = _status_bytes("VmRSS")
    start = time.perf_counter()
    results = workload.step(provider.logprobs, inputs)
    seconds = time.perf_counter() - start
    peak = _peak_bytes(was_reset)
    report = {
        "peak_extra_bytes": peak - held,
        "result_bytes": sum(t.nbytes for t in results),
        "first_ms": 1e3 * seconds,
        **_check(results[0], inputs, sizes),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
