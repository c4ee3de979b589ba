"""``python -m fastpo.info``: versions, and which kernels serve which device here, or why not."""

from __future__ import annotations

import platform

import torch

import fastpo
from fastpo import backends


def report() -> str:
    """The text that ``python -m fastpo.info`` prints."""
    lines = [
        f"fastpo   {fastpo.__version__}",
        f"python   {platform.python_version()} on {platform.machine()}",
        f"torch    {torch.__version__} (CUDA {torch.version.cuda or 'not built in'})",
    ]
    if torch.cuda.is_available():
        lines += [f"device   {torch.cuda.get_device_name()}"]
    lines += [f"threads  {torch.get_num_threads()}"]
    missing = "no GPU is found" if torch.version.cuda else "torch is built without CUDA"
    for device in ("cpu", "cuda"):
        usable = device == "cpu" or torch.cuda.is_available()
        here = "available" if usable else f"built, but {missing}"
        for name in backends.NAMES:
            lines += [f"{device:5} {name:10} {backends.why_not(name, device) or here}"]
    return "\n".join(lines)


def main() -> None:
    """Print the report."""
    print(report())


if __name__ == "__main__":
    main()
