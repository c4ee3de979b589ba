"""Published vectors and properties of the losses over single labelled responses."""

from __future__ import annotations

import math

import pytest
import torch

from fastpo.losses import BCODelta, apo_zero_unpaired, bco, bco_pair, kto, udm_weights


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


def test_apo_zero_unpaired_vector(batch, check_vector):
    check_vector(apo_zero_unpaired(*batch, beta=0.5).loss, 0.4854972665)


def test_apo_zero_unpaired_is_kto_at_a_reference_point_of_zero(batch):
    options = dict(beta=0.5, desirable_weight=2.0, undesirable_weight=0.5, reduction="none")
    got, want = apo_zero_unpaired(*batch, **options), kto(*batch, 0.0, **options)
    torch.testing.assert_close(got[:2], want[:2])
    policy, _, desirable = batch
    assert (apo_zero_unpaired(policy, policy, desirable, reduction="none").loss == 0.5).all()


ROWS = [0.6094704307, 0.6325990353, 0.7575990353, 0.6094704307, 0.7844704307, 0.6094704307]


def test_bco_vector(batch, check_vector, vector_dtype):
    policy, ref, _ = batch
    delta = BCODelta()(0.5 * (policy - ref))
    check_vector(delta, -0.075)
    check_vector(bco(*batch, delta, beta=0.5, reduction="none").loss, ROWS)
    check_vector(bco(*batch, delta, beta=0.5).loss, 0.6671799655)
    check_vector(bco(*batch, -0.075, beta=0.5).loss, 0.6671799655)


def test_bco_delta_has_no_gradient(batch):
    policy, ref, desirable = batch
    delta = torch.tensor(0.2, requires_grad=True)
    bco(policy.requires_grad_(), ref, desirable, delta).loss.backward()
    assert delta.grad is None
    with pytest.raises(ValueError, match="bco: delta: expected a tensor of one element"):
        bco(*batch, torch.zeros(2))


def test_bco_on_pairs_without_shift_is_half_of_bco_pair(f1):
    """The mean over responses against the sum over the two responses of a pair."""
    policy, ref = torch.cat(f1.sums[:2]), torch.cat(f1.sums[2:])
    desirable = torch.tensor([True] * 3 + [False] * 3)
    got = bco(policy, ref, desirable, 0.0, beta=0.5).loss
    torch.testing.assert_close(2 * got, bco_pair(*f1.sums, beta=0.5).loss)


@pytest.mark.parametrize("label", [True, False])
def test_bco_accepts_one_label_alone(batch, label):
    both = bco(*batch, 0.1, reduction="none").loss
    alone = bco(*(x[batch[2] == label] for x in batch), 0.1, reduction="none").loss
    assert torch.equal(alone, both[batch[2] == label])


def test_bco_weights_apply_to_undesirable_responses_alone(batch):
    policy, ref, desirable = batch
    weights = torch.arange(1.0, 7.0, dtype=policy.dtype, requires_grad=True)
    plain = bco(*batch, 0.1, reduction="none").loss
    out = bco(policy.requires_grad_(), ref, desirable, 0.1, weights=weights, reduction="none")
    want = plain * torch.where(desirable, 1.0, weights.detach()).to(plain)
    torch.testing.assert_close(out.loss.detach(), want)
    out.loss.sum().backward()
    assert weights.grad is None


def test_udm_weights():
    probability = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0], dtype=torch.float64, requires_grad=True)
    weights = udm_weights(probability)
    inner = [0.5 / (0.5 + 1e-8), 0.8 / (1 - 0.8 + 1e-8)]
    want = torch.tensor([0.5, 0.5, *inner, 10.0], dtype=torch.float64)
    torch.testing.assert_close(weights, want)
    assert not weights.requires_grad
    with pytest.raises(ValueError, match="udm_weights: low, high: expected 0 < low <= high"):
        udm_weights(probability, low=2.0, high=1.0)
