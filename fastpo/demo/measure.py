"""Time and peak memory of the loss end, forward and backward, each in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

SIZES = {"tokens": 1024, "hidden": 512, "vocab": 32_768}
REPEATS = 3


def _reset_peak() -> None:
    """Set the peak of resident memory to what is in use now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def measure(method: str, tokens: int, hidden: int, vocab: int) -> dict[str, float | None]:
    """Median seconds and peak bytes beyond the inputs of one forward and backward; fp32, CPU.

    Args:
        method: ``fastpo``, or ``torch`` for linear, log_softmax and gather.
        tokens: N.
        hidden: H.
        vocab: V.

    Returns:
        ``seconds``, ``peak_bytes`` (None where the system does not tell) and ``sum_logprobs``,
        nats.
    """
    import torch

    import fastpo

    torch.manual_seed(0)
    hidden_NH = torch.randn(tokens, hidden, requires_grad=True)
    weight_VH = (torch.randn(vocab, hidden) / hidden**0.5).requires_grad_()
    targets_N = torch.randint(vocab, (tokens,))

    def step() -> float:
        hidden_NH.grad = weight_VH.grad = None
        if method == "fastpo":
            logprobs_N = fastpo.linear_logprobs(hidden_NH, weight_VH, targets_N)
        else:
            logits_NV = torch.nn.functional.linear(hidden_NH, weight_VH)
            logprobs_N = logits_NV.log_softmax(-1).gather(-1, targets_N[:, None]).squeeze(-1)
        total = logprobs_N.sum()
        total.backward()
        return total.item()

    small = slice(0, 64)
    fastpo.linear_logprobs(
        hidden_NH[small], weight_VH[small], targets_N[small] % 64
    ).sum().backward()
    hidden_NH.grad = weight_VH.grad = None
    peak_bytes = None
    try:
        _reset_peak()
        before = _status_bytes("VmRSS")
        total = step()
        peak_bytes = _status_bytes("VmHWM") - before
    except OSError:
        total = step()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    median = sorted(seconds)[REPEATS // 2]
    return {"seconds": median, "peak_bytes": peak_bytes, "sum_logprobs": total}


def compare() -> dict[str, dict[str, float | None]]:
    """``measure`` of both methods at ``SIZES``, in turns: the faster of two runs of each."""
    results: dict[str, dict[str, float | None]] = {}
    for method in ("torch", "fastpo") * 2:
        command = [sys.executable, "-m", "fastpo.demo.measure", method, *map(str, SIZES.values())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"measuring {method} failed: {done.stderr.strip()[-2000:]}")
        found = json.loads(done.stdout)
        if method not in results or found["seconds"] < results[method]["seconds"]:
            results[method] = found
    return results


if __name__ == "__main__":
    name, *sizes = sys.argv[1:]
    print(json.dumps(measure(name, *map(int, sizes))))
