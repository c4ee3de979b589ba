"""MODPO and constrained preference optimisation: vectors, special cases, guards."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import softplus

from fastpo.losses import cpo_constrained, dpo, hinge, modpo, sigmoid_norm

CHOSEN_MARGIN, REJECTED_MARGIN = [0.3, -0.2, 0.5], [0.1, 0.4, -0.1]


def margins(dtype=torch.float64):
    return [[torch.tensor(x, dtype=dtype)] for x in (CHOSEN_MARGIN, REJECTED_MARGIN)]


def test_modpo_vector(f1_cast, vector_dtype, check_vector):
    options = dict(weights=(0.6, 0.4), beta=0.5)
    given = margins(vector_dtype)
    out = modpo(*f1_cast.sums, *given, reduction="none", **options)
    check_vector(out.loss, [0.4932489460, 0.5472965438, 0.8639632105])
    check_vector(modpo(*f1_cast.sums, *given, **options).loss, 0.6348362334)
    check_vector(softplus(out.rejected_rewards - out.chosen_rewards), out.loss.tolist())


def test_modpo_of_one_objective_is_dpo(f1):
    for given, weights in ((margins(), (1.0, 0.0)), (([], []), (1.0,))):
        out = modpo(*f1.sums, *given, weights=weights, beta=0.3)
        torch.testing.assert_close(out.loss, dpo(*f1.sums, beta=0.3).loss)
        hinged = modpo(*f1.sums, *given, weights=weights, beta=0.3, link="hinge").loss
        torch.testing.assert_close(hinged, hinge(*f1.sums, beta=0.3).loss)


def test_modpo_equal_margins_cancel(f1):
    given = margins()[0], margins()[0]
    out = modpo(*f1.sums, *given, weights=(0.6, 0.4), beta=0.3)
    torch.testing.assert_close(out.loss, dpo(*f1.sums, beta=0.5).loss)


def test_modpo_weighs_each_objective(f1):
    """Two equal margins at half the weight each are one margin at the full weight."""
    one = modpo(*f1.sums, *margins(), weights=(0.6, 0.4)).loss
    two = modpo(*f1.sums, *(m * 2 for m in margins()), weights=(0.6, 0.1, 0.3)).loss
    torch.testing.assert_close(two, one)


def test_modpo_margins_get_no_gradient(f1):
    policy = f1.policy_chosen.clone().requires_grad_()
    given = [[m.clone().requires_grad_() for m in side] for side in margins()]
    modpo(policy, *f1.sums[1:], *given, weights=(0.6, 0.4)).loss.backward()
    assert policy.grad is not None
    assert all(m.grad is None for side in given for m in side)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(weights=(0.6,)), "modpo: weights: expected one more than margins on each side"),
        (dict(weights=(0.0, 1.0)), r"modpo: weights\[0\]: expected a positive"),
        (dict(weights=(0.5, math.nan)), r"modpo: weights\[1\]: expected a finite"),
        (dict(weights=(0.6, 0.4), link="log"), "modpo: link: expected one of sigmoid, hinge"),
    ],
)
def test_modpo_options(options, match, f1):
    with pytest.raises(ValueError, match=match):
        modpo(*f1.sums, *margins(), **options)


def test_modpo_margin_shape(f1):
    with pytest.raises(ValueError, match=r"modpo: rejected_margins\[0\]: expected shape \[3\]"):
        modpo(*f1.sums, margins()[0], [torch.zeros(2)], weights=(0.6, 0.4))


CPO_VECTORS = {
    "easy": (dict(gamma=0.02), [0.5987074581, 0.6797998403, 0.7437696776], 0.6740923253),
    "easy_default_gamma": ({}, None, 0.6435782842),
    "clip": (dict(form="clip"), [0.6171109266, 0.7443966601, 0.7981388694], 0.7198821520),
    "soft_floor": (
        dict(form="soft_floor", gamma=0.5),
        [0.7449420665, 0.9186328428, 0.9821777021],
        0.8819175371,
    ),
    "soft_floor_sharp": (dict(form="soft_floor", gamma=0.5, tau=1e4), None, 0.8385400986),
    "paper": (
        dict(form="paper", gamma=0.02),
        [0.5800109922, 0.7674630832, 0.7251982367],
        0.6908907707,
    ),
}


@pytest.mark.parametrize("key", CPO_VECTORS)
def test_cpo_constrained_vector(key, f1_cast, check_vector):
    options, per_pair, mean = CPO_VECTORS[key]
    out = cpo_constrained(*f1_cast, beta=0.5, **options)
    check_vector(out.loss, mean)
    assert out.metrics["undesirable"].item() == 0
    if per_pair:
        none = cpo_constrained(*f1_cast, beta=0.5, reduction="none", **options)
        check_vector(none.loss, per_pair)


def means(f1):
    """m of the policy and r of the reference, chosen then rejected."""
    counts = f1.chosen_counts, f1.rejected_counts
    return [x / n for x, n in zip(f1.sums, counts * 2, strict=True)]


def test_margin_of_easy(f1):
    chosen, rejected, ref_chosen, ref_rejected = means(f1)
    u = chosen - ref_chosen - rejected + ref_rejected
    margin = {
        "mean_logp": 0.02 * (1 / ref_chosen + 1 / ref_rejected),
        "prob": 0.02 * (1 / ref_chosen.exp() + 1 / ref_rejected.exp()),
    }
    assert torch.equal(margin["mean_logp"] < 0, margin["prob"] > 0)
    for of, m in margin.items():
        got = cpo_constrained(*f1, beta=0.5, gamma=0.02, margin_of=of, reduction="none").loss
        torch.testing.assert_close(got, softplus(m - 0.5 * u))


def test_sharp_soft_floor_is_the_larger_of_gap_and_gamma(f1):
    chosen, rejected, ref_chosen, ref_rejected = means(f1)
    g = ref_chosen - ref_rejected
    for gamma in (0.05, 0.3):
        want = softplus(-0.5 * (chosen - rejected - g.clamp(min=gamma)))
        options = dict(form="soft_floor", gamma=gamma, tau=1e6, reduction="none")
        got = cpo_constrained(*f1, beta=0.5, **options).loss
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_alpha_divides_the_soft_floor(f1):
    options = dict(form="soft_floor", beta=0.5, gamma=0.5)
    loose = cpo_constrained(*f1, alpha=1e9, **options).loss
    torch.testing.assert_close(loose, sigmoid_norm(*f1, beta=0.5).loss)


def test_without_margin(f1):
    normed = sigmoid_norm(*f1, beta=0.5)
    for of in ("mean_logp", "prob"):
        got = cpo_constrained(*f1, beta=0.5, gamma=0.0, margin_of=of)
        for x, y in zip(got[:3], normed[:3], strict=True):
            torch.testing.assert_close(x, y)
    paper = cpo_constrained(*f1, beta=0.5, gamma=0.0, form="paper")
    for x, y in zip(paper[:3], dpo(*f1.sums, beta=0.5)[:3], strict=True):
        torch.testing.assert_close(x, y)


def test_clip_is_sigmoid_norm_where_the_reference_prefers_the_chosen(f1):
    _, _, ref_chosen, ref_rejected = means(f1)
    options = dict(beta=0.5, reduction="none")
    clipped = cpo_constrained(*f1, form="clip", **options).loss
    same = clipped == sigmoid_norm(*f1, **options).loss
    assert torch.equal(same, ref_chosen >= ref_rejected)
    assert same.any()
    assert not same.all()


def test_undesirable_region():
    # Reference gap -2 throughout: below it, inside the region, at order, right.
    policy = torch.tensor([-5.0, -3.0, -2.0, -1.0])
    ref, rejected = torch.full((4,), -4.0), torch.full((4,), -2.0)
    ones = torch.ones(4)
    for form in ("easy", "clip", "soft_floor", "paper"):
        out = cpo_constrained(policy, rejected, ref, rejected, ones, ones, form=form)
        assert out.metrics["undesirable"].item() == 0.25


@pytest.mark.parametrize(
    "options", [{}, dict(margin_of="prob"), dict(form="paper"), dict(form="soft_floor")]
)
@pytest.mark.parametrize("ref", [0.0, -1e4])
def test_certain_and_impossible_references_are_finite(options, ref):
    policy = torch.tensor([-1.0], requires_grad=True)
    refs, one = torch.tensor([ref]), torch.ones(1)
    out = cpo_constrained(policy, torch.tensor([-1.0]), refs, refs, one, one, **options)
    out.loss.backward()
    assert out.loss.isfinite()
    assert policy.grad.isfinite()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(form="hard"), "cpo_constrained: form: expected one of easy, clip, soft_floor, paper"),
        (dict(margin_of="logp"), "cpo_constrained: margin_of: expected one of mean_logp, prob"),
        (dict(gamma=-0.1), "cpo_constrained: gamma: expected a finite number >= 0"),
        (dict(tau=0), "cpo_constrained: tau: expected a positive"),
        (dict(alpha=0), "cpo_constrained: alpha: expected a positive"),
    ],
)
def test_cpo_constrained_options(options, match, f1):
    with pytest.raises(ValueError, match=match):
        cpo_constrained(*f1, **options)
