"""Fixtures: every available backend in turn, and a fixed seed."""

import sys
from typing import NamedTuple

import pytest
import torch

from fastpo import backends

SIM_ORDERS = {"sim": 0, "sim-descending": 1, "sim-shuffled": 2}


class Backend(NamedTuple):
    name: str
    device: torch.device

    @property
    def is_sim(self) -> bool:
        """The simulator runs every thread as a fiber: keep its cases small."""
        return self.name.startswith("sim")


def _available() -> list[str]:
    names = ["reference", "cpu"]
    if not backends.why_not("sim", "cpu"):
        names += list(SIM_ORDERS)
    return [*names, "cuda"] if backends.has_cuda() else names


@pytest.fixture(params=_available())
def backend(request):
    """Every backend here; the simulator once for each order of its threads."""
    name = request.param
    device = torch.device("cuda" if name == "cuda" else "cpu")
    module_name = "sim" if name in SIM_ORDERS else name
    if name in SIM_ORDERS:
        backends.sim_thread_order(SIM_ORDERS[name])
    with backends.use(module_name):
        yield Backend(name, device)


@pytest.fixture(params=["cpu", "cuda"] if backends.has_cuda() else ["cpu"])
def device(request):
    """Every device whose own kernels are here."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _no_shared_cache(tmp_path_factory):
    """Data sets are cached in a folder of the test run, and in that of its subprocesses."""
    folder = str(tmp_path_factory.mktemp("datasets"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", folder)
        if "datasets" in sys.modules:
            patch.setattr(sys.modules["datasets"].config, "HF_DATASETS_CACHE", folder)
        yield
