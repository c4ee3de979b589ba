"""Vectors and properties of the losses of noise, anchored and shaped, over pairs."""

from __future__ import annotations

import math

import pytest
import torch

from fastpo import losses

VECTORS = {  # loss, options at beta 0.5, per pair, mean
    "robust": (
        losses.robust,
        dict(label_smoothing=0.1),
        [0.4896321554, 0.7247096480, 0.6622096480],
        0.6255171505,
    ),
    "exo_pair": (
        losses.exo_pair,
        dict(label_smoothing=1e-3),
        [2.1780655098, 2.8478595644, 2.6752266586],
        2.5670505776,
    ),
    "nca_pair": (losses.nca_pair, {}, [1.3045647000, 1.3998878021, 1.3851780140], 1.3632101720),
    "bco_pair": (losses.bco_pair, {}, [1.2203360800, 1.4128563081, 1.3740782893], 1.3357568924),
    "sppo_hard": (losses.sppo_hard, {}, [0.89, 2.25, 2.21], 1.7833333333),
    "apo_zero": (losses.apo_zero, {}, [0.9128443116, 1.0124817910, 0.9876574964], 0.9709945330),
    "apo_down": (losses.apo_down, {}, [0.9383616086, 1.0249947930, 0.9376686062], 0.9670083359),
    "discopop": (
        losses.discopop,
        dict(tau=0.05),
        [0.7045320212, 0.8079664320, 0.8751809189],
        0.7958931240,
    ),
    "dpop": (
        losses.dpop,
        dict(penalty=5.0),
        [0.5333821554, 0.7184596480, 1.2769564069],
        0.8429327368,
    ),
    "flex_dpo": (
        losses.flex_dpo,
        dict(beta_rejected=0.2),
        [0.5981388694, 0.6881596805, 0.7443966601],
        0.6768984033,
    ),
    "sigmoid_norm": (
        losses.sigmoid_norm,
        {},
        [0.6171109266, 0.7036180997, 0.7642586025],
        0.6949958763,
    ),
    "r_dpo": (
        losses.r_dpo,
        dict(alpha=0.02),
        [0.5251629497, 0.7082596763, 0.6981596805],
        0.6438607689,
    ),
}
COUNTED = ("sigmoid_norm", "r_dpo")


def call(key, pairs, **options):
    loss, fixed, *_ = VECTORS[key]
    return loss(*(pairs if key in COUNTED else pairs.sums), **{"beta": 0.5, **fixed, **options})


@pytest.mark.parametrize("key", VECTORS)
def test_published_vector(key, f1_cast, check_vector):
    *_, per_pair, mean = VECTORS[key]
    check_vector(call(key, f1_cast, reduction="none").loss, per_pair)
    check_vector(call(key, f1_cast).loss, mean)
    check_vector(call(key, f1_cast, reduction="sum").loss, sum(per_pair))


def test_published_vector_of_cal_dpo(f1_cast, check_vector):
    check_vector(losses.cal_dpo(*f1_cast.sums, beta=0.5).loss, 1.4889931230)


LOG_RATIO_REWARDS = [key for key in VECTORS if key not in ("sigmoid_norm", "flex_dpo")]


@pytest.mark.parametrize("key", LOG_RATIO_REWARDS)
def test_rewards_are_beta_times_the_log_ratios(key, f1_cast, check_vector):
    out = call(key, f1_cast)
    check_vector(out.chosen_rewards, [0.1, 0.05, -0.2])
    check_vector(out.rejected_rewards, [-0.25, 0.1, -0.25])


def test_rewards_on_another_scale(f1_cast, check_vector):
    normed = call("sigmoid_norm", f1_cast)
    check_vector(normed.chosen_rewards, [0.1 / 3, 0.05 / 4, -0.2])
    check_vector(normed.rejected_rewards, [-0.125, 0.1 / 3, -0.0625])
    flexible = call("flex_dpo", f1_cast)
    check_vector(flexible.chosen_rewards, [0.1, 0.05, -0.2])
    check_vector(flexible.rejected_rewards, [-0.1, 0.04, -0.1])


AT_THE_REFERENCE = {
    "robust": math.log(2),
    "nca_pair": 2 * math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 1 / (2 * 0.5**2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": (math.log(2) + 1) / 2,
    "dpop": math.log(2),
    "flex_dpo": math.log(2),
    "sigmoid_norm": math.log(2),
}


@pytest.mark.parametrize("key", AT_THE_REFERENCE)
def test_value_at_the_reference(key, f1):
    pairs = f1._replace(ref_chosen=f1.policy_chosen, ref_rejected=f1.policy_rejected)
    assert call(key, pairs).loss.item() == pytest.approx(AT_THE_REFERENCE[key], rel=1e-14)


@pytest.mark.parametrize("key", ["robust", "exo_pair", "discopop"])
def test_depends_on_the_difference_of_log_ratios_alone(key, f1):
    moved = f1._replace(policy_chosen=f1.policy_chosen + 3, policy_rejected=f1.policy_rejected + 3)
    torch.testing.assert_close(call(key, moved).loss, call(key, f1).loss)


@pytest.mark.parametrize(
    "key", ["nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "dpop", "flex_dpo"]
)
def test_sees_both_log_ratios_move_together(key, f1):
    moved = f1._replace(policy_chosen=f1.policy_chosen - 3, policy_rejected=f1.policy_rejected - 3)
    assert (call(key, moved).loss - call(key, f1).loss).abs() > 0.01


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, beta: losses.robust(*p.sums, beta=beta, label_smoothing=0.0),
        lambda p, beta: losses.dpop(*p.sums, beta=beta, penalty=0.0),
        lambda p, beta: losses.r_dpo(*p, alpha=0.0, beta=beta),
        lambda p, beta: losses.flex_dpo(*p.sums, beta_rejected=beta, beta=beta),
    ],
    ids=["robust", "dpop", "r_dpo", "flex_dpo"],
)
def test_special_case_is_dpo(loss, f1):
    torch.testing.assert_close(loss(f1, 0.3).loss, losses.dpo(*f1.sums, beta=0.3).loss)


def test_robust_is_dpo_in_expectation_over_flipped_labels(f1):
    e, options = 0.2, dict(beta=0.5, reduction="none")
    swapped = (*f1.sums[1::-1], *f1.sums[:1:-1])
    seen = losses.robust(*f1.sums, label_smoothing=e, **options).loss
    flipped = losses.robust(*swapped, label_smoothing=e, **options).loss
    clean = losses.dpo(*f1.sums, **options).loss
    torch.testing.assert_close((1 - e) * seen + e * flipped, clean)


def test_robust_falls_without_bound():
    margins, zero = torch.tensor([100.0, 200.0], dtype=torch.float64), torch.zeros(2)
    sums = margins, zero, zero, zero
    loss = losses.robust(*sums, beta=1, label_smoothing=0.1, reduction="none").loss
    assert (loss[1] - loss[0]).item() == pytest.approx(-100 * 0.1 / 0.8)


def test_exo_minimum_is_0_at_the_smoothed_label():
    e, beta = 0.1, 0.5
    best = torch.tensor([math.log((1 - e) / e) / beta], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    loss = losses.exo_pair(best, zero, zero, zero, beta=beta, label_smoothing=e).loss
    loss.backward()
    assert abs(loss.item()) < 1e-15
    assert abs(best.grad.item()) < 1e-15


@pytest.mark.parametrize("label_smoothing", [0.0, -0.1, 0.5])
def test_exo_needs_label_smoothing(label_smoothing, f1):
    with pytest.raises(ValueError, match=r"exo_pair: label_smoothing: expected a number in"):
        losses.exo_pair(*f1.sums, label_smoothing=label_smoothing)


@pytest.mark.parametrize("loss", [losses.apo_zero, losses.apo_down])
def test_apo_lies_between_0_and_2(loss):
    values = torch.tensor([-30.0, 0.0, 30.0], dtype=torch.float64)
    chosen, rejected = torch.cartesian_prod(values, values).unbind(1)
    out = loss(chosen, rejected, torch.zeros(9), torch.zeros(9), beta=1, reduction="none").loss
    assert ((out > 0) & (out < 2)).all()


def test_apo_is_exact_where_it_is_small():
    sums = torch.tensor([[40.0], [-40.0], [0.0], [0.0]])
    want = 2 * math.exp(-40)
    assert losses.apo_zero(*sums, beta=1).loss.item() == pytest.approx(want, rel=1e-6)


def test_cal_dpo_is_a_logistic_loss_plus_sppo(f1):
    for coefficient in (0.0, 0.5, 1.0):
        want = losses.dpo(*f1.sums, beta=1).loss
        want = want + coefficient * losses.sppo_hard(*f1.sums, beta=0.3).loss
        got = losses.cal_dpo(*f1.sums, beta=0.3, coefficient=coefficient).loss
        torch.testing.assert_close(got, want)


def test_discopop_is_its_formula_where_that_does_not_overflow(f1):
    z = 0.5 * (f1.policy_chosen - f1.ref_chosen - f1.policy_rejected + f1.ref_rejected)
    m = torch.sigmoid(z / 0.3)
    want = (1 - m) * torch.nn.functional.softplus(-z) + m * torch.exp(-z)
    got = losses.discopop(*f1.sums, beta=0.5, tau=0.3, reduction="none").loss
    torch.testing.assert_close(got, want)


def test_sigmoid_norm_is_simpo_over_a_uniform_reference(f1):
    refs = -2.0 * f1.chosen_counts.double(), -2.0 * f1.rejected_counts.double()
    got = losses.sigmoid_norm(*f1.sums[:2], *refs, *f1.counts, beta=0.5)
    want = losses.simpo(*f1.sums[:2], *f1.counts, beta=0.5, gamma=0.0)
    torch.testing.assert_close(got.loss, want.loss)


def test_dpop_penalises_below_the_reference_alone(f1):
    plain = losses.dpo(*f1.sums, beta=0.5, reduction="none").loss
    loss = losses.dpop(*f1.sums, beta=0.5, penalty=1.0, reduction="none").loss
    assert torch.equal(loss[:2], plain[:2])
    assert loss[2] > plain[2]


def test_r_dpo_relieves_longer_chosen_responses(f1):
    plain = losses.dpo(*f1.sums, reduction="none").loss
    penalised = losses.r_dpo(*f1, alpha=0.05, reduction="none").loss
    assert torch.equal(penalised < plain, f1.chosen_counts > f1.rejected_counts)


def test_flex_dpo_reports_the_gradient_ratio_in_probability_space(f1):
    log_probs = [x.clone().requires_grad_() for x in f1.sums[:2]]
    out = losses.flex_dpo(*log_probs, *f1.sums[2:], beta_rejected=0.2, beta=0.5, reduction="sum")
    chosen, rejected = torch.autograd.grad(out.loss, log_probs)
    # dL/dp = dL/dS / p
    ratio = (rejected.abs() / f1.policy_rejected.exp()) / (chosen.abs() / f1.policy_chosen.exp())
    torch.testing.assert_close(out.metrics["log_gradient_ratio"], ratio.log())


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda s: losses.cal_dpo(*s, coefficient=-1), "cal_dpo: coefficient: .* >= 0"),
        (lambda s: losses.discopop(*s, tau=0), "discopop: tau: expected a positive"),
        (lambda s: losses.dpop(*s, penalty=-1), "dpop: penalty: .* >= 0"),
        (lambda s: losses.r_dpo(*s, *s[:2], alpha=math.inf), "r_dpo: alpha: expected a finite"),
        (lambda s: losses.flex_dpo(*s, beta_rejected=0), "flex_dpo: beta_rejected: expected a pos"),
        (
            lambda s: losses.robust(*s, label_smoothing=0.5),
            r"robust: label_smoothing: .*\[0, 0.5\)",
        ),
        (lambda s: losses.r_dpo(*s, *s[:1], s[0][:2], alpha=1), "r_dpo: rejected_counts: .*shape"),
        (lambda s: losses.sigmoid_norm(*s, s[0][:2], s[0]), "sigmoid_norm: chosen_counts: .*shape"),
    ],
)
def test_options_out_of_range(call, match, f1):
    with pytest.raises(ValueError, match=match):
        call(f1.sums)
