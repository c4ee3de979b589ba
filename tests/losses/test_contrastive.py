"""Published vectors and properties of the contrastive losses with a likelihood term."""

from __future__ import annotations

import math

import pytest
import torch

from fastpo.losses import alphapo, asft, cpo, cpo_simpo, dpo, orpo, sigmoid_norm, simpo, tpo_triple


def _policy(pairs):
    return (pairs.policy_chosen, pairs.policy_rejected, *pairs.counts)


def test_cpo_vector(f1_cast, check_vector):
    args, options = _policy(f1_cast), dict(beta=0.5)
    expected = [0.6443966601, 1.1368710061, 0.2107229647]
    check_vector(cpo(*args, cpo_alpha=0.0, reduction="none", **options).loss, expected)
    out = cpo(*args, **options)
    check_vector(out.loss, 1.6139968770)
    check_vector(out.metrics["nll"], 0.95)
    check_vector(out.chosen_rewards, [-1.25, -1.8, -0.75])


def test_cpo_simpo_vector(f1_cast, check_vector):
    args, options = _policy(f1_cast), dict(beta=2.0, gamma=0.5)
    check_vector(cpo_simpo(*args, **options).loss, 1.0812616071 + 0.95)
    sequence = cpo_simpo(*args, nll_mean="sequence_mean", cpo_alpha=0.5, **options)
    check_vector(sequence.loss, 1.0812616071 + 0.5 * 1.0777777778)


def test_alphapo_vector(f1_cast, check_vector):
    args, options = _policy(f1_cast), dict(alpha=0.25, beta=2.5, gamma=0.1)
    expected = [0.1842101209, 1.1103919185, 1.6888464055]
    check_vector(alphapo(*args, reduction="none", **options).loss, expected)
    check_vector(alphapo(*args).loss, 0.9944828150)


def test_asft_vector(f1_cast, check_vector):
    args = _policy(f1_cast)
    nll = asft(*args, beta=0.0, reduction="none").loss
    align = asft(*args, beta=1.0, reduction="none").loss - nll
    check_vector(align, [1.1334122780, 1.5863410028, 1.9047719739])
    check_vector(asft(*args).loss, 2.6192861960)
    check_vector(nll.mean(), 1.0777777778)


def test_cpo_without_likelihood_is_dpo_with_a_uniform_reference(f1):
    zero = torch.zeros(3, dtype=torch.float64)
    want = dpo(*f1.sums[:2], zero, zero, beta=0.5, label_smoothing=0.1).loss
    got = cpo(*_policy(f1), beta=0.5, cpo_alpha=0.0, label_smoothing=0.1).loss
    torch.testing.assert_close(got, want)


def test_cpo_hinge_takes_sums_and_ipo_means(f1):
    options = dict(beta=0.5, cpo_alpha=0.0, reduction="none")
    sums, means = f1.sums[:2], [x / n for x, n in zip(f1.sums[:2], f1.counts, strict=True)]
    hinge_loss = cpo(*_policy(f1), form="hinge", **options).loss
    torch.testing.assert_close(hinge_loss, (1 - 0.5 * (sums[0] - sums[1])).clamp(min=0))
    out = cpo(*_policy(f1), form="ipo", **options)
    torch.testing.assert_close(out.loss, (means[0] - means[1] - 1.0) ** 2)
    torch.testing.assert_close(out.chosen_rewards, 0.5 * means[0])


@pytest.mark.parametrize("form", ["hinge", "ipo"])
@pytest.mark.parametrize("loss", [cpo, tpo_triple])
def test_smoothing_belongs_to_the_logistic_forms(loss, form, f1):
    sums, counts = [*f1.sums[:2]], [*f1.counts]
    if loss is tpo_triple:
        sums, counts = [*sums, f1.policy_chosen], [*counts, f1.chosen_counts]
    with pytest.raises(ValueError, match=f"label_smoothing: expected 0 with form {form}"):
        loss(*sums, *counts, form=form, label_smoothing=0.1)


def test_cpo_simpo_without_likelihood_is_simpo(f1):
    options = dict(beta=1.5, gamma=0.3, label_smoothing=0.2)
    got = cpo_simpo(*_policy(f1), cpo_alpha=0.0, **options)
    want = simpo(*_policy(f1), **options)
    torch.testing.assert_close(got[:3], want[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alphapo_goes_over_to_simpo_without_noise(f1, dtype):
    args = [x.to(dtype) if x.is_floating_point() else x for x in _policy(f1)]
    options = dict(beta=2.5, gamma=0.1)
    want = simpo(*args, **options)
    assert torch.equal(alphapo(*args, alpha=0.0, **options).loss, want.loss)
    # r = m - alpha m^2 / 2 + ..., so that r and m agree to alpha |m| / 2, here below one ulp.
    for alpha in (1e-300, 1e-40, 1e-21, 1e-18, -1e-18):
        got = alphapo(*args, alpha=alpha, **options)
        torch.testing.assert_close(got[:3], want[:3], rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_alphapo_is_smooth_across_small_alpha(f1):
    """The first two terms of the series, m - alpha m^2 / 2; the third is alpha^2 m^3 / 6."""
    means = f1.policy_chosen / f1.chosen_counts
    for alpha in (1e-5, -1e-5):
        out = alphapo(*_policy(f1), alpha=alpha, beta=1.0)
        series = means - alpha * means**2 / 2
        bound = (alpha**2 * means.abs() ** 3).max().item()
        torch.testing.assert_close(out.chosen_rewards, series, rtol=0, atol=bound)


def test_simpo_is_length_normalised_dpo_with_a_reference_uniform_over_tokens(f1):
    refs = [-3.0 * count.double() for count in f1.counts]
    want = sigmoid_norm(*f1.sums[:2], *refs, *f1.counts, beta=2.0)
    torch.testing.assert_close(simpo(*_policy(f1), beta=2.0, gamma=0.0).loss, want.loss)


def test_asft_aligns_more_than_orpo(f1):
    nll = dict(reduction="none", nll_mean="sequence_mean")
    orpo_align = orpo(*_policy(f1), beta=1.0, **nll).loss - orpo(*_policy(f1), beta=0.0, **nll).loss
    options = dict(reduction="none")
    asft_align = (
        asft(*_policy(f1), beta=1.0, **options).loss - asft(*_policy(f1), beta=0.0, **options).loss
    )
    assert (orpo_align <= asft_align).all()


def test_asft_is_finite_where_the_rejected_is_certain():
    ones = torch.ones(1)
    rejected = torch.zeros(1, requires_grad=True)
    loss = asft(torch.tensor([-1.0]), rejected, ones, ones).loss
    loss.backward()
    # 1 - p is held at the machine epsilon.
    assert loss.item() == pytest.approx(2 - math.log(torch.finfo(torch.float32).eps))
    assert torch.isfinite(rejected.grad).all()


def _triple(pairs):
    gold, count = pairs.ref_chosen, pairs.chosen_counts
    return *pairs.sums[:2], gold, *pairs.counts, count


@pytest.mark.parametrize("form", ["sigmoid", "hinge", "ipo"])
def test_tpo_on_the_chosen_is_cpo(f1, form):
    """With the chosen response as the gold one."""
    args = (*f1.sums[:2], f1.policy_chosen, *f1.counts, f1.chosen_counts)
    got = tpo_triple(*args, beta=0.5, form=form)
    torch.testing.assert_close(got, cpo(*_policy(f1), beta=0.5, form=form))


def test_tpo_length_normalised_is_simpo_plus_the_gold_likelihood(f1):
    options = dict(beta=2.0, gamma=0.5, label_smoothing=0.1)
    out = tpo_triple(*_triple(f1), form="tpo_l", tpo_alpha=0.7, **options)
    want = simpo(*_policy(f1), **options)
    gold = -f1.ref_chosen.sum() / f1.chosen_counts.sum()
    torch.testing.assert_close(out.loss, want.loss + 0.7 * gold)
    torch.testing.assert_close(out[1:3], want[1:3])
    torch.testing.assert_close(out.metrics["nll"], gold)


def test_tpo_gold_gets_the_gradient_of_its_likelihood(f1):
    chosen, rejected, gold, *counts = _triple(f1)
    gold = gold.clone().requires_grad_()
    tpo_triple(chosen, rejected, gold, *counts, tpo_alpha=0.5).loss.backward()
    want = torch.full((3,), -0.5 / f1.chosen_counts.sum().item(), dtype=torch.float64)
    torch.testing.assert_close(gold.grad, want)


def test_option_names(f1):
    with pytest.raises(ValueError, match="cpo: form: expected one of sigmoid, hinge, ipo"):
        cpo(*_policy(f1), form="simpo")
    with pytest.raises(ValueError, match=r"tpo_triple: form: expected one of .*tpo_l"):
        tpo_triple(*_triple(f1), form="tpo-l")
    with pytest.raises(ValueError, match="cpo: cpo_alpha: expected a finite number >= 0"):
        cpo(*_policy(f1), cpo_alpha=-1.0)
    with pytest.raises(ValueError, match="tpo_triple: extra_counts: expected shape"):
        tpo_triple(*_triple(f1)[:5], torch.ones(2))
    with pytest.raises(ValueError, match="alphapo: alpha: expected a finite number"):
        alphapo(*_policy(f1), alpha=float("nan"))
