"""Which kernels serve a device, why not, and that importing starts nothing."""

import subprocess
import sys

import pytest
import torch

import fastpo
from fastpo import backends, info


def test_own_kernels_serve_the_cpu():
    assert backends.name("cpu") == "cpu"
    assert backends.why_not("cpu", "cpu") == ""


def test_override_and_restore():
    with backends.use("reference"):
        assert backends.name("cpu") == "reference"
        with backends.use("cpu"):
            assert backends.name("cpu") == "cpu"
        assert backends.name("cpu") == "reference"
    assert backends.name("cpu") == "cpu"


def test_unknown_backend_is_an_error():
    with pytest.raises(backends.BackendError, match=r"'tpu' is not available.*cuda, cpu"), \
            backends.use("tpu"):  # fmt: skip
        pass


def test_wrong_device_is_an_error_with_every_reason(monkeypatch):
    monkeypatch.setattr(backends, "_override", "cuda")
    with pytest.raises(
        backends.BackendError, match=r"no cuda kernels for cpu.*reference: available"
    ):
        fastpo.linear_logprobs(torch.randn(3, 8), torch.randn(20, 8), torch.arange(3))


def test_device_without_kernels_is_an_error():
    with pytest.raises(backends.BackendError, match="no meta kernels"):
        backends.name("meta")


def test_info_tells_every_backend():
    text = info.report()
    assert fastpo.__version__ in text
    assert all(name in text for name in backends.NAMES)


def test_import_starts_nothing_heavy():
    heavy = ["transformers", "trl", "datasets", "peft", "accelerate", "diffusers", "matplotlib"]
    heavy += ["fastpo._cpu", "fastpo._cuda", "fastpo._sim", "torch._inductor", "triton"]
    program = (
        "import sys, fastpo, torch; assert not torch.cuda.is_initialized();"
        f"print(sorted({set(heavy)} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
