"""Stated rules and properties of the losses whose published form could not be read."""

from __future__ import annotations

import pytest
import torch

from fastpo.losses import dpo, mapl, sft_fdiv

F64 = torch.float64
DIVERGENCES = ["chi2", "hellinger", "js"]


def test_sft_fdiv_rules(f1):
    x = 0.5 * (f1.policy_chosen - f1.ref_chosen)
    want = {"chi2": x - x**2 / 4, "hellinger": x / (1 + x), "js": torch.log(2 - torch.exp(-x))}
    for name, phi in want.items():
        options = dict(beta=0.5, divergence=name, reduction="none")
        out = sft_fdiv(f1.policy_chosen, f1.ref_chosen, **options)
        torch.testing.assert_close(out.loss, -phi)
        torch.testing.assert_close(out.rewards, x)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_sft_fdiv_starts_as_the_likelihood(divergence):
    """phi(0) = 0 and phi'(0) = 1: at the reference the gradient is that of plain fine-tuning."""
    policy = torch.full((4,), -3.0, dtype=F64, requires_grad=True)
    loss = sft_fdiv(policy, policy.detach(), beta=0.5, divergence=divergence).loss
    loss.backward()
    assert loss == 0
    torch.testing.assert_close(policy.grad, torch.full((4,), -0.5 / 4, dtype=F64))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_sft_fdiv_is_convex_with_a_continuous_slope(divergence):
    policy = torch.linspace(-3, 3, 601, dtype=F64, requires_grad=True)
    options = dict(beta=1.0, divergence=divergence)
    sft_fdiv(policy, torch.zeros(601, dtype=F64), reduction="sum", **options).loss.backward()
    slopes = policy.grad.diff()
    assert (slopes >= -1e-12).all()
    # Second derivatives at -1/2 and above are at most 37 (js), over steps of 0.01.
    assert slopes.max() < 0.37


def test_mapl_on_one_response_is_dpo(f1):
    torch.testing.assert_close(mapl(*f1.sums, beta=0.5), dpo(*f1.sums, beta=0.5))


def test_mapl_between_pairs_compares_margins(f1):
    chosen, rejected, ref_chosen, ref_rejected = f1.sums
    other = (torch.full((3,), 0.3, dtype=F64)).requires_grad_()
    got = mapl(*f1.sums, other, beta=0.5)
    want = dpo(chosen - other.detach(), rejected, ref_chosen, ref_rejected, beta=0.5)
    torch.testing.assert_close(got.loss.detach(), want.loss)
    got.loss.backward()
    assert (other.grad > 0).all()
    with pytest.raises(ValueError, match=r"mapl: other_margins: expected shape \[3\]"):
        mapl(*f1.sums, other[:2])


def test_divergence_name(f1):
    with pytest.raises(
        ValueError, match="sft_fdiv: divergence: expected one of chi2, hellinger, js"
    ):
        sft_fdiv(f1.policy_chosen, f1.ref_chosen, divergence="kl")
