"""Published vectors and properties of the losses over pairs without a reference."""

from __future__ import annotations

import math

import pytest
import torch

from fastpo.losses import dpo, orpo, simpo


def _policy(pairs):
    return (pairs.policy_chosen, pairs.policy_rejected, *pairs.counts)


def test_simpo_vector(f1_cast, check_vector):
    args, options = _policy(f1_cast), dict(beta=2.0, gamma=0.5)
    out = simpo(*args, reduction="none", **options)
    check_vector(out.loss, [0.4616224926, 1.2411538747, 1.5410084538])
    check_vector(simpo(*args, **options).loss, 1.0812616071)
    check_vector(out.chosen_rewards, [2 * -2.5 / 3, 2 * -3.6 / 4, 2 * -1.5])
    check_vector(out.rejected_rewards, [2 * -2.7 / 2, 2 * -2.1 / 3, 2 * -4.4 / 4])


def test_orpo_vector(f1_cast, check_vector):
    args = _policy(f1_cast)
    check_vector(orpo(*args, beta=0.1).loss, 1.0258023829)
    check_vector(orpo(*args, beta=0.0).loss, 0.95)
    check_vector(orpo(*args, beta=0.0, nll_mean="sequence_mean").loss, 1.0777777778)
    with_odds = orpo(*args, beta=1.0, nll_mean="sequence_mean", reduction="none").loss
    nll = orpo(*args, beta=0.0, nll_mean="sequence_mean", reduction="none").loss
    check_vector(with_odds - nll, [0.3752096714, 0.8919168624, 1.0069449524])


def test_orpo_token_mean_shares_add_up(f1):
    args = _policy(f1)
    shares = orpo(*args, reduction="none").loss
    torch.testing.assert_close(shares.mean(), orpo(*args).loss)


def test_orpo_nll_over_other_tokens(f1):
    args = _policy(f1)
    extra = orpo(*args, beta=0.0, nll_sums=2 * f1.policy_chosen, nll_counts=f1.chosen_counts)
    torch.testing.assert_close(extra.loss, 2 * orpo(*args, beta=0.0).loss)
    with pytest.raises(ValueError, match="orpo: nll_sums, nll_counts: expected both or neither"):
        orpo(*args, nll_sums=f1.policy_chosen)


def test_simpo_without_margin_is_length_normalised_dpo_with_a_uniform_reference(f1):
    # A uniform reference gives every response of n tokens n log(1/V): the same mean, so it cancels.
    means = (f1.policy_chosen / f1.chosen_counts, f1.policy_rejected / f1.rejected_counts)
    uniform = torch.full((3,), -math.log(32000), dtype=torch.float64)
    torch.testing.assert_close(
        simpo(*_policy(f1), beta=2.0, gamma=0.0).loss, dpo(*means, uniform, uniform, beta=2.0).loss
    )


def test_simpo_smoothing_does_not_flip_the_margin(f1):
    options = dict(beta=2.0, reduction="none")
    plain = simpo(*_policy(f1), gamma=0.5, **options).loss
    swapped = (f1.policy_rejected, f1.policy_chosen, f1.rejected_counts, f1.chosen_counts)
    # -logsigmoid(-(beta difference - gamma)): roles swapped and the margin negated.
    against = simpo(*swapped, gamma=-0.5, **options).loss
    smoothed = simpo(*_policy(f1), gamma=0.5, label_smoothing=0.2, **options).loss
    torch.testing.assert_close(smoothed, 0.8 * plain + 0.2 * against)


def test_orpo_is_bounded_by_the_likelihood_of_the_chosen_and_unlikelihood_of_the_rejected(f1):
    means = (f1.policy_chosen / f1.chosen_counts, f1.policy_rejected / f1.rejected_counts)
    options = dict(nll_mean="sequence_mean", reduction="none")
    odds = orpo(*_policy(f1), beta=1.0, **options).loss + means[0]
    assert (odds <= -means[0] - torch.log1p(-means[1].exp())).all()


def _odds_term(chosen, rejected):
    one = torch.ones(1, dtype=torch.int64)
    total = orpo(chosen, rejected, one, one, beta=1.0, nll_mean="sequence_mean").loss
    return total + chosen.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [(0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-1e-30, -1e4), (-1e4, -1e-30), (-1e4, 0.0)],
)
def test_orpo_is_finite_at_certainty(chosen, rejected, dtype):
    means = [torch.tensor([m], dtype=dtype, requires_grad=True) for m in (chosen, rejected)]
    loss = _odds_term(*means)
    grads = torch.autograd.grad(loss, means)
    assert all(torch.isfinite(x).all() for x in (loss, *grads))
    assert grads[0] <= 0
    assert grads[1] >= 0


@pytest.mark.parametrize("mean", [-1e-5, -0.1, -math.log(2), -0.7, -5.0, -60.0])
def test_orpo_odds_keep_their_digits_in_float32(mean):
    fixed = -1.0
    truth = _odds_term(*(torch.tensor([m], dtype=torch.float64) for m in (fixed, mean)))
    got = _odds_term(torch.tensor([fixed]), torch.tensor([mean]))
    # log1p(-exp(m)) in float32 is off by 1.4e-3 at m = -1e-5.
    assert got.item() == pytest.approx(truth.item(), rel=1e-6, abs=1e-6)
