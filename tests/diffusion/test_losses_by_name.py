"""No loss that diffusion runs offer by name is another one in silence."""

import itertools

import pytest
import torch

from fastpo.inputs import inputs_of

pytest.importorskip("diffusers")

from fastpo.trainers.diffusion_setup import POLICY, PairLoss, pair_losses

BETA = 2.0


def value_and_gradient(name, tensors):
    policy = {one: tensors[one].clone().requires_grad_() for one in POLICY}
    has_beta = "beta" in pair_losses()[name].__annotations__
    value = PairLoss(name, beta=BETA if has_beta else None)(tensors | policy).loss
    return value.detach(), torch.cat(torch.autograd.grad(value, list(policy.values())))


@pytest.mark.parametrize("weighted", [False, True])
def test_losses_differ_on_random_errors(weighted):
    """With one beta; what a loss can do without is left out, or given."""
    torch.manual_seed(0)
    inputs = {name: inputs_of(function) for name, function in pair_losses().items()}
    needed = {n for own in inputs.values() for n, x in own.items() if weighted or x.is_required}
    tensors = {name: torch.rand(4, dtype=torch.float64) for name in sorted(needed)}
    found = {name: value_and_gradient(name, tensors) for name in inputs}
    for one, other in itertools.combinations(found, 2):
        for a, b in zip(found[one], found[other], strict=True):
            assert not torch.allclose(a, b, rtol=1e-6), (one, other)
