"""The f-divergence transform of log-ratios, and f-DPO."""

from __future__ import annotations

import math

import pytest
import torch

from fastpo.losses import dpo, f_divergence_score, f_dpo, hinge, ipo, robust, sigmoid_norm

VECTORS = {
    "forward_kl": (
        dict(divergence="forward_kl"),
        [0.5070244554, 0.7149055276, 0.6546921068],
        0.6255406966,
    ),
    "js_divergence": (
        dict(divergence="js_divergence"),
        [0.6035727110, 0.7047784950, 0.6779982598],
        0.6621164886,
    ),
    "alpha_divergence": (
        dict(divergence="alpha_divergence", alpha=0.25),
        [0.5145464155, 0.7157419831, 0.6587169006],
        0.6296684331,
    ),
}
KINDS = ("reverse_kl", *VECTORS)


@pytest.mark.parametrize("key", VECTORS)
def test_published_vector(key, f1_cast, check_vector):
    options, per_pair, mean = VECTORS[key]
    out = f_dpo(*f1_cast.sums, beta=0.5, reduction="none", **options)
    check_vector(out.loss, per_pair)
    check_vector(f_dpo(*f1_cast.sums, beta=0.5, **options).loss, mean)
    check_vector(torch.nn.functional.softplus(out.rejected_rewards - out.chosen_rewards), per_pair)


@pytest.mark.parametrize("kind", KINDS)
def test_score_is_the_derivative_of_its_generator(kind):
    """f'(t) by autograd of f, up to the constant that makes f'(1) = 0."""
    alpha = 0.3
    generators = {
        "reverse_kl": lambda t: t * t.log() - t,
        "forward_kl": lambda t: t - t.log(),
        "js_divergence": lambda t: t * t.log() - (1 + t) * ((1 + t) / 2).log(),
        "alpha_divergence": lambda t: (t**alpha / alpha - t) / (alpha - 1),
    }
    log_ratios = torch.tensor([-2.0, -0.1, 0.0, 0.7, 3.0], dtype=torch.float64)
    t = log_ratios.exp().requires_grad_()
    (derivative,) = torch.autograd.grad(generators[kind](t).sum(), t)
    got = f_divergence_score(log_ratios, kind, alpha)
    torch.testing.assert_close(got, derivative)
    assert got[2].abs() < 1e-15


def test_alpha_is_one_minus_the_papers():
    r = torch.tensor([-0.7, 0.4], dtype=torch.float64)
    for paper_alpha in (0.5, 0.9):
        want = (1 - torch.exp(-paper_alpha * r)) / paper_alpha
        got = f_divergence_score(r, "alpha_divergence", 1 - paper_alpha)
        torch.testing.assert_close(got, want)


def test_alpha_0_is_forward_kl_and_alpha_1_reverse_kl():
    r = torch.tensor([-0.7, 0.4])
    forward = f_divergence_score(r, "forward_kl")
    assert torch.equal(f_divergence_score(r, "alpha_divergence", 0.0), forward)
    assert torch.equal(f_divergence_score(r, "alpha_divergence", 1.0), r)


def test_reverse_kl_and_alpha_near_1_are_dpo(f1):
    want = dpo(*f1.sums, beta=0.5).loss
    assert torch.equal(f_dpo(*f1.sums, beta=0.5).loss, want)
    for alpha in (1 - 1e-9, 1 + 1e-9):
        got = f_dpo(*f1.sums, beta=0.5, divergence="alpha_divergence", alpha=alpha).loss
        torch.testing.assert_close(got, want, rtol=1e-8, atol=0)


@pytest.mark.parametrize(("kind", "share"), [("forward_kl", 1.0), ("js_divergence", 0.5)])
def test_small_log_ratios_are_dpo_with_a_share_of_beta(kind, share):
    policy = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (1e-6, -2e-6)]
    zero = torch.zeros(1, dtype=torch.float64)
    got = torch.autograd.grad(f_dpo(*policy, zero, zero, beta=0.5, divergence=kind).loss, policy)
    want = torch.autograd.grad(dpo(*policy, zero, zero, beta=0.5 * share).loss, policy)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", [dpo, hinge, robust])
def test_composes_with_any_loss_of_a_difference(loss, f1):
    a, b = f1.policy_chosen - f1.ref_chosen, f1.policy_rejected - f1.ref_rejected
    zero = torch.zeros(3)
    reverse = f_divergence_score(a), f_divergence_score(b)
    torch.testing.assert_close(loss(*reverse, zero, zero).loss, loss(*f1.sums).loss)
    # Monotone: the order of pairs is kept.
    for kind in KINDS:
        scores = f_divergence_score(a, kind), f_divergence_score(b, kind)
        assert torch.equal(scores[0] > scores[1], a > b)
        assert loss(*scores, zero, zero).loss.isfinite()


@pytest.mark.parametrize("loss", [ipo, sigmoid_norm])
def test_the_constant_counts_once_scores_are_divided_by_lengths(loss, f1):
    """At the reference every divergence gives the value of reverse KL, whatever the lengths."""
    zero = torch.zeros(3)
    want = loss(zero, zero, zero, zero, *f1.counts).loss
    for kind in KINDS:
        score = f_divergence_score(zero, kind)
        torch.testing.assert_close(loss(score, score, zero, zero, *f1.counts).loss, want)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 80.0), (torch.float64, 700.0)])
@pytest.mark.parametrize(("kind", "power"), [("forward_kl", -1.0), ("alpha_divergence", -0.5)])
def test_exponents_end_at_a_limit(dtype, limit, kind, power):
    r = torch.tensor([-1e4, 1e4, 0.9 * limit / power], dtype=dtype, requires_grad=True)
    score = f_divergence_score(r, kind)
    ends = [math.expm1(limit) / power, -1 / power, math.expm1(0.9 * limit) / power]
    want = torch.tensor(ends, dtype=dtype)
    torch.testing.assert_close(score, want, rtol=1e-5, atol=0)
    score.sum().backward()
    assert torch.isfinite(score).all()
    assert torch.equal(r.grad[:2], torch.zeros(2, dtype=dtype))
    assert r.grad[2] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_log_ratios_are_computed_in_float32(dtype):
    r = torch.tensor([[0.25, -0.5]], dtype=dtype)
    for kind in KINDS:
        assert torch.equal(f_divergence_score(r, kind), f_divergence_score(r.float(), kind))


def test_rewards_are_what_the_loss_compares(f1):
    out = f_dpo(*f1.sums, beta=0.5, divergence="js_divergence")
    a = f1.policy_chosen - f1.ref_chosen
    torch.testing.assert_close(out.chosen_rewards, 0.5 * f_divergence_score(a, "js_divergence"))


def test_unknown_divergence(f1):
    with pytest.raises(ValueError, match="divergence: expected one of reverse_kl, forward_kl"):
        f_dpo(*f1.sums, divergence="kl")
    with pytest.raises(ValueError, match="alpha: expected a finite number"):
        f_dpo(*f1.sums, alpha=math.nan)
