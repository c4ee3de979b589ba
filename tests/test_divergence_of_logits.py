"""``divergence``: of logits that exist."""

import pytest
import torch
from divergence_parts import (
    DTYPES,
    KINDS,
    of_logits,
    transformed,
)
from tolerance import assert_close_to_truth

import fastpo


def of_logits_run(function, logits, upstream, dtype, wanted, **options):
    """On the slice that a causal model's logits are cut to."""
    inputs = [x.to(dtype).detach().requires_grad_(i in wanted) for i, x in enumerate(logits)]
    values = function(*(x[:, :-1] for x in inputs), **options)
    (values.double() * upstream).sum().backward()
    return values, [inputs[i].grad for i in wanted]


@pytest.mark.parametrize(("kind", "alpha"), KINDS, ids=str)
@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_divergence_of_logits(device, dtype, wanted, kind, alpha):
    logits = [torch.randn(2, 4, 57).to(dtype).to(device) for _ in range(2)]
    mask = torch.tensor([[True, True, False], [False, True, True]], device=device)
    upstream = torch.randn(2, 3, device=device).double()
    options = {"kind": kind, "alpha": alpha, "mask": mask}

    def plainly(z, ref_z, *, temperature, softcap, **rest):
        z, ref_z = (transformed(x, temperature, 1.0, softcap) for x in (z, ref_z))
        return of_logits(z, ref_z, **rest)

    for transform in ({"temperature": 1.0, "softcap": None}, {"temperature": 0.8, "softcap": 3.0}):
        rest = (logits, upstream)
        truth = of_logits_run(plainly, *rest, torch.float64, wanted, **options, **transform)
        base = of_logits_run(plainly, *rest, dtype, wanted, **options, **transform)
        out = of_logits_run(fastpo.divergence, *rest, dtype, wanted, **options, **transform)
        assert_close_to_truth(out[0], truth[0], base[0], what="divergence")
        assert (out[0][~mask] == 0).all()
        for grad, wanted_grad, base_grad in zip(out[1], truth[1], base[1], strict=True):
            assert_close_to_truth(grad, wanted_grad, base_grad, what="d logits")
            assert (grad[:, -1] == 0).all()
            assert (grad[:, :-1][~mask] == 0).all()


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4, 7), (0, 7), (2, 0, 7)])
def test_divergence_of_logits_of_any_leading_shape(device, shape):
    logits, ref_logits = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))
    mask = torch.rand(shape[:-1], device=device) < 0.5
    out = fastpo.divergence(logits, ref_logits, kind="js", mask=mask)
    expected = of_logits(logits, ref_logits, "js", 0.5, mask)
    assert torch.allclose(out, expected, atol=1e-6)
    found = torch.autograd.grad(out.sum(), (logits, ref_logits))
    for grad, wanted in zip(
        found, torch.autograd.grad(expected.sum(), (logits, ref_logits)), strict=True
    ):
        assert torch.allclose(grad, wanted, atol=1e-6)


def test_divergence_of_logits_by_an_expanded_gradient(device):
    """The gradient of a plain sum is one number with strides of 0."""
    logits, ref_logits = (torch.randn(3, 7, device=device, requires_grad=True) for _ in range(2))
    fastpo.divergence(logits, ref_logits).sum().backward()
    ones = torch.ones(3, device=device)
    (grad,) = torch.autograd.grad(fastpo.divergence(logits, ref_logits), logits, ones)
    assert torch.equal(logits.grad, grad)


def test_divergence_of_logits_gradcheck():
    logits = [torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *z: fastpo.divergence(*z, kind="chi2"), logits)
