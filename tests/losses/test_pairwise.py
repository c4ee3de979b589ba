"""Published vectors and properties of the losses over pairs with a reference."""

from __future__ import annotations

import math

import pytest
import torch

from fastpo.losses import dpo, hinge, ipo

VECTORS = {
    "dpo": (
        lambda p: dict(fn=dpo, args=p.sums),
        [0.5333821554, 0.7184596480, 0.6684596480],
        0.6401004838,
    ),
    "cdpo": (
        lambda p: dict(fn=dpo, args=p.sums, label_smoothing=0.1),
        [0.5683821554, 0.7134596480, 0.6734596480],
        0.6517671505,
    ),
    "hinge": (lambda p: dict(fn=hinge, args=p.sums), [0.65, 1.05, 0.95], 0.8833333333),
    "ipo": (
        lambda p: dict(fn=ipo, args=p),
        [0.4669444444, 1.0850694444, 1.6256250000],
        1.0592129630,
    ),
    "ipo_summed": (
        lambda p: dict(fn=ipo, args=p.sums, convention="summed"),
        [0.09, 1.21, 0.81],
        0.7033333333,
    ),
}


@pytest.mark.parametrize("key", VECTORS)
def test_published_vector(key, f1_cast, check_vector):
    call, per_pair, mean = VECTORS[key]
    options = call(f1_cast)
    fn, args = options.pop("fn"), options.pop("args")
    check_vector(fn(*args, beta=0.5, reduction="none", **options).loss, per_pair)
    check_vector(fn(*args, beta=0.5, **options).loss, mean)
    check_vector(fn(*args, beta=0.5, reduction="sum", **options).loss, sum(per_pair))


@pytest.mark.parametrize("loss", [dpo, hinge, ipo])
def test_rewards_are_beta_times_the_log_ratio_sums(loss, f1_cast, check_vector):
    out = loss(*(f1_cast if loss is ipo else f1_cast.sums), beta=0.5)
    check_vector(out.chosen_rewards, [0.1, 0.05, -0.2])
    check_vector(out.rejected_rewards, [-0.25, 0.1, -0.25])


def test_at_the_reference_dpo_is_log_2_with_any_smoothing(f1):
    sums = (f1.policy_chosen, f1.policy_rejected) * 2
    for label_smoothing in (0.0, 0.2):
        assert dpo(*sums, label_smoothing=label_smoothing).loss.item() == pytest.approx(math.log(2))


def test_label_smoothing_is_the_expectation_over_flipped_labels(f1):
    options = dict(beta=0.5, reduction="none")
    swapped = (*f1.sums[1::-1], *f1.sums[:1:-1])
    clean, flipped = dpo(*f1.sums, **options).loss, dpo(*swapped, **options).loss
    smoothed = dpo(*f1.sums, label_smoothing=0.3, **options).loss
    torch.testing.assert_close(smoothed, 0.7 * clean + 0.3 * flipped)


def test_cdpo_minimum_lies_at_the_log_odds_of_the_labels():
    e, beta = 0.1, 0.5
    best = torch.tensor([math.log((1 - e) / e) / beta], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    dpo(best, zero, zero, zero, beta=beta, label_smoothing=e).loss.backward()
    assert best.grad.abs().item() < 1e-15


def test_hinge_has_no_gradient_beyond_the_margin():
    chosen = torch.tensor([0.5, 3.0], requires_grad=True)
    zero = torch.zeros(2)
    hinge(chosen, zero, zero, zero, beta=0.5, reduction="sum").loss.backward()
    assert chosen.grad.tolist() == [-0.5, 0.0]


def test_ipo_summed_at_the_reference(f1):
    sums = (f1.policy_chosen, f1.policy_rejected) * 2
    loss = ipo(*sums, beta=0.5, convention="summed").loss.item()
    assert loss == pytest.approx(1 / (4 * 0.5**2))


def test_ipo_conventions_agree_on_single_tokens(f1):
    ones = torch.ones(3, dtype=torch.int64)
    torch.testing.assert_close(
        ipo(*f1.sums, ones, ones).loss, ipo(*f1.sums, convention="summed").loss
    )


@pytest.mark.parametrize(
    "loss",
    [
        lambda *s: dpo(*s, beta=0.5, label_smoothing=0.1),
        lambda *s: hinge(*s, beta=0.5),
        lambda *s: ipo(*s, beta=0.5, convention="summed"),
    ],
)
def test_depends_on_the_difference_of_log_ratios_alone(loss, f1):
    chosen, rejected, ref_chosen, ref_rejected = f1.sums
    shifted = loss(chosen + 3, rejected + 3, ref_chosen, ref_rejected).loss
    torch.testing.assert_close(shifted, loss(*f1.sums).loss)


def test_ipo_averaged_needs_counts(f1):
    with pytest.raises(ValueError, match=r"ipo: chosen_counts, .*: expected .* got None"):
        ipo(*f1.sums)
    with pytest.raises(ValueError, match="ipo: convention: expected one of averaged, summed"):
        ipo(*f1, convention="mean")


@pytest.mark.parametrize("label_smoothing", [-0.1, 0.5, math.nan])
def test_label_smoothing_range(label_smoothing, f1):
    with pytest.raises(ValueError, match=r"dpo: label_smoothing: expected a number in \[0, 0.5\)"):
        dpo(*f1.sums, label_smoothing=label_smoothing)
