"""Published vectors and properties of the losses over single labelled responses."""

from __future__ import annotations

import math

import pytest
import torch

from fastpo.losses import kto


@pytest.fixture
def batch(f1_cast):
    """Chosen as desirable, rejected as undesirable."""
    policy = torch.cat((f1_cast.policy_chosen, f1_cast.policy_rejected))
    ref = torch.cat((f1_cast.ref_chosen, f1_cast.ref_rejected))
    return policy, ref, torch.tensor([True] * 3 + [False] * 3)


def test_kto_vector(batch, check_vector):
    expected = [0.5, 0.5124973965, 0.5744425168, 0.4133824211, 0.5, 0.4133824211]
    for kl in (0.2, torch.tensor(0.2, dtype=torch.float64), torch.tensor([0.2])):
        out = kto(*batch, kl, beta=0.5, reduction="none")
        check_vector(out.loss, expected)
    check_vector(kto(*batch, 0.2, beta=0.5).loss, 0.4856174592)
    check_vector(out.rewards, [0.1, 0.05, -0.2, -0.25, 0.1, -0.25])


def test_kto_at_the_reference_is_one_half(batch):
    policy, _, desirable = batch
    out = kto(policy, policy, desirable, 0.0, reduction="none")
    assert (out.loss == 0.5).all()


def test_kto_reference_point_is_clamped_and_has_no_gradient(batch):
    kl = torch.tensor(-0.3, requires_grad=True)
    policy, ref, desirable = batch
    below = kto(policy.requires_grad_(), ref, desirable, kl, beta=0.5)
    torch.testing.assert_close(below.loss, kto(*batch, 0.0, beta=0.5).loss)
    above = kto(*batch, torch.tensor(0.3, requires_grad=True), beta=0.5)
    (below.loss + above.loss).backward()
    assert kl.grad is None


def test_kto_weights(batch):
    plain = kto(*batch, 0.2, reduction="none").loss
    weighted = kto(*batch, 0.2, desirable_weight=2.0, undesirable_weight=0.5, reduction="none")
    torch.testing.assert_close(weighted.loss, plain * torch.where(batch[2], 2.0, 0.5).to(plain))


@pytest.mark.parametrize("label", [True, False])
def test_kto_accepts_one_label_alone(batch, label):
    policy, ref, desirable = (x[batch[2] == label] for x in batch)
    both = kto(*batch, 0.2, reduction="none").loss
    alone = kto(policy, ref, desirable, 0.2, reduction="none").loss
    assert torch.equal(alone, both[batch[2] == label])


def test_kto_keeps_digits_of_small_losses():
    ratio, zero = torch.tensor([100.0]), torch.zeros(1)
    loss = kto(ratio, zero, torch.tensor([True]), 0.0, beta=0.5).loss.item()
    assert loss == pytest.approx(math.exp(-50), rel=1e-5, abs=0)  # 1 - sigmoid(50) is 0 in float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(desirable=torch.ones(6)), "kto: desirable: expected torch.bool"),
        (dict(desirable=torch.ones(5, dtype=torch.bool)), "kto: desirable: expected torch.bool"),
        (dict(kl=torch.zeros(6)), "kto: kl: expected a tensor of one element"),
        (dict(kl=math.nan), "kto: kl: expected a finite number"),
        (dict(desirable_weight=-1.0), "kto: desirable_weight: expected a finite number >= 0"),
        (dict(undesirable_weight=math.inf), "kto: undesirable_weight: expected a finite number"),
    ],
)
def test_kto_checks(batch, change, message):
    arguments = dict(zip(("policy", "ref", "desirable"), batch, strict=True), kl=0.2) | change
    with pytest.raises(ValueError, match=message):
        kto(**arguments)
