"""Peak memory of the loss end, each measured in a process of its own."""

import subprocess
import sys

import pytest

PROGRAM = """
import torch, fastpo
N, H, V, trained, workspace_bytes = {N}, {H}, {V}, {trained}, {workspace_bytes}

def read(field):
    with open("/proc/self/status") as lines:
        return next(int(l.split()[1]) for l in lines if l.startswith(field)) / 1024

def step(n, weight):
    hidden = torch.randn(n, H, requires_grad=True)
    {values}
    return values, hidden

weight = torch.zeros(V, H).normal_(std=H**-0.5).requires_grad_(trained)
warm, _ = step(64, weight[:256])  # threads, code and the BLAS's own buffers
warm.sum().backward()
weight.grad = None
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the peak so far
before = read("VmRSS")
values, hidden = step(N, weight)
values.sum().backward()
print(read("VmHWM") - before)
"""


LOGPROBS = """
    targets = torch.randint(len(weight), (n,))
    values = fastpo.linear_logprobs(hidden, weight, targets, workspace_bytes=workspace_bytes)
"""
DIVERGENCE = """
    ref_hidden = torch.randn(n, H)
    values = fastpo.linear_divergence(hidden, weight, ref_hidden, workspace_bytes=workspace_bytes)
"""


def peak_extra_mib(N, H, V, trained, workspace_bytes=None, values=LOGPROBS):
    program = PROGRAM.format(
        N=N, H=H, V=V, trained=trained, workspace_bytes=workspace_bytes, values=values
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@pytest.fixture(autouse=True)
def _needs_peak_counter():
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pytest.skip("this system does not let a process reset its peak memory counter")


def test_frozen_head_holds_no_logits():
    """N=2048 H=1024 V=32768 fp32: plain torch holds 900 MiB; hidden and its gradient are 16."""
    assert peak_extra_mib(2048, 1024, 32768, trained=False) < 100


def test_frozen_head_does_not_grow_with_the_vocabulary():
    small = peak_extra_mib(1024, 256, 8192, trained=False)
    large = peak_extra_mib(1024, 256, 8 * 8192, trained=False)
    logits_mib = 1024 * 7 * 8192 * 4 / 2**20
    assert large - small < 0.05 * logits_mib


def test_frozen_head_grows_with_the_tokens_by_rows_of_hidden_only():
    H = 256
    small = peak_extra_mib(1024, H, 16384, trained=False)
    large = peak_extra_mib(4096, H, 16384, trained=False)
    rows_mib = 3072 * H * 4 / 2**20
    # hidden, its gradient and the unit gradient, and an allowance of one more for the allocator
    assert large - small < 4 * rows_mib + 4


@pytest.mark.parametrize("workspace_mib", [4, 40])
def test_trained_head_holds_its_gradient_and_the_workspace(workspace_mib):
    """The whole logits would be 64 MiB, and a second gradient another 64."""
    H, V = 512, 32768
    gradient_mib = H * V * 4 / 2**20
    extra = peak_extra_mib(512, H, V, trained=True, workspace_bytes=workspace_mib << 20)
    # A slice of the gradient in float32, hidden and its gradient, and an allowance
    assert extra < gradient_mib + workspace_mib + 16


def test_divergence_holds_no_logits():
    """N=1024 H=512 V=32768 fp32: two logits are 256 MiB, and their log-softmax as much again."""
    workspace = 16 << 20
    extra = peak_extra_mib(1024, 512, 32768, False, workspace, DIVERGENCE)
    # Both hidden states, the gradient and the unit gradient are 2 MiB each
    assert extra < 16 + 8 + 16


def test_divergence_does_not_grow_with_the_vocabulary():
    small = peak_extra_mib(512, 256, 8192, False, 8 << 20, DIVERGENCE)
    large = peak_extra_mib(512, 256, 8 * 8192, False, 8 << 20, DIVERGENCE)
    logits_mib = 2 * 512 * 7 * 8192 * 4 / 2**20
    assert large - small < 0.05 * logits_mib


@pytest.mark.parametrize("workspace_mib", [4, 40])
def test_divergence_with_a_trained_head(workspace_mib):
    """Both logits would be 128 MiB, and a second gradient another 64."""
    H, V = 512, 32768
    gradient_mib = H * V * 4 / 2**20
    extra = peak_extra_mib(512, H, V, True, workspace_mib << 20, DIVERGENCE)
    # A slice of the gradient in float32, the hidden states and a gradient, what the BLAS
    # keeps for two threads, and an allowance
    assert extra < gradient_mib + workspace_mib + 32
