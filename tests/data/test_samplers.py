"""Samplers of prompts: weights, draws, fading beliefs, and going on from a saved state."""

from __future__ import annotations

import math

import pytest
import torch

from fastpo.data.samplers import BetaSampler, VarianceAwareSampler, variance_weights

F64 = torch.float64
RATES = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=F64)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _shares(prompts: torch.Tensor, count: int) -> torch.Tensor:
    return prompts.bincount(minlength=count).double() / len(prompts)


# ------------------------------------------------------------------ weights


def test_published_weights():
    want = torch.tensor([0, 0.7499999700, 0.9999999600, 0], dtype=F64)
    torch.testing.assert_close(variance_weights(RATES), want, rtol=0, atol=1e-9)


def test_weights_with_diversity():
    """0.1875 + 0.5 * 0.25 is the largest score, 0 the smallest, 0.25 stands at 0.8."""
    diversity = torch.tensor([0.0, 0.25, 0.0, 0.125], dtype=F64)
    got = variance_weights(RATES, diversity, diversity_weight=0.5)
    want = torch.tensor([0, 1, 0.8, 0.2], dtype=F64)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)
    assert torch.equal(variance_weights(RATES, diversity, 0.0), variance_weights(RATES))


def test_weights_see_the_distance_from_a_half_alone():
    rates = torch.linspace(0, 1, 11, dtype=F64)
    weights = variance_weights(rates)
    torch.testing.assert_close(weights, weights.flip(0))
    assert (weights.diff()[:5] > 0).all()


@pytest.mark.parametrize("value", [0.0, 0.3, math.nan])
def test_weights_of_prompts_that_do_not_differ_are_zero(value):
    assert variance_weights(torch.full((3,), value)).tolist() == [0, 0, 0]


def test_unknown_prompts_have_no_weight():
    got = variance_weights(torch.tensor([0.5, math.nan, 0.0, 0.5], dtype=F64))
    assert got[1] == got[2] == 0
    assert got[0] == got[3] > 0.99
    assert variance_weights(torch.zeros(0)).shape == (0,)


# ------------------------------------------------------------------ variance-aware batches


def _sampler(count=4, batch_size=8, seed=0, **options):
    return VarianceAwareSampler(count, batch_size, generator=_generator(seed), **options)


def test_half_of_a_batch_follows_the_weights_and_half_a_permutation():
    sampler = _sampler()
    sampler.record(torch.arange(4), RATES)
    batches = torch.stack([sampler.draw() for _ in range(4000)])
    weighted, rest = batches[:, :4].flatten(), batches[:, 4:]
    weights = variance_weights(RATES)
    want = weights / weights.sum()
    # Five standard deviations of a share of 16000 draws.
    bound = 5 * (want * (1 - want) / weighted.numel()).sqrt()
    assert ((_shares(weighted, 4) - want).abs() <= bound).all()
    assert torch.equal(rest.sort(dim=1).values, torch.arange(4).expand(4000, 4))
    assert len(rest.unique(dim=0)) == 24


@pytest.mark.parametrize(("batch_size", "weighted"), [(1, 0), (5, 2), (6, 3)])
def test_the_weighted_part_is_rounded_down(batch_size, weighted):
    sampler = _sampler(10, batch_size)
    sampler.record(torch.tensor([3, 4]), torch.tensor([0.5, 0.0]))
    batch = sampler.draw()
    assert batch.shape == (batch_size,)
    assert batch[:weighted].tolist() == [3] * weighted


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_one_part_alone(share):
    sampler = _sampler(7, 7, weighted_share=share)
    sampler.record(torch.tensor([5, 6]), torch.tensor([0.5, 0.0]))
    batch = sampler.draw().sort().values.tolist()
    assert batch == ([5] * 7 if share else list(range(7)))


def test_the_permutation_shows_every_prompt_once_before_the_next():
    sampler = _sampler(5, 3, weighted_share=0.0)
    order = torch.cat([sampler.draw() for _ in range(10)]).view(6, 5)
    assert torch.equal(order.sort(dim=1).values, torch.arange(5).expand(6, 5))
    assert len(order.unique(dim=0)) > 1
    # A batch of more prompts than there are.
    assert _sampler(2, 9, weighted_share=0.0).draw().bincount().tolist() in ([4, 5], [5, 4])


@pytest.mark.parametrize("rate", [None, 0.0, 0.5])
def test_equal_prompts_are_drawn_uniformly(rate):
    sampler = _sampler(4, 100, weighted_share=1.0)
    if rate is not None:
        sampler.record(torch.arange(4), torch.full((4,), rate))
    shares = _shares(torch.cat([sampler.draw() for _ in range(100)]), 4)
    bound = 5 * math.sqrt(0.25 * 0.75 / 10000)
    assert (shares - 0.25).abs().max() <= bound


def test_weights_are_refreshed_every_few_batches():
    sampler = _sampler(2, 10, weighted_share=1.0, refresh_every=3)
    sampler.record(torch.arange(2), torch.tensor([0.5, 0.0]))
    assert sampler.draw().tolist() == [0] * 10
    sampler.record(torch.arange(2), torch.tensor([0.0, 0.5]))
    seen = [sampler.draw().unique().tolist() for _ in range(4)]
    assert seen == [[0], [0], [1], [1]]


def test_momentum_mixes_old_and_new_weights():
    sampler = _sampler(3, 2, momentum=0.75, refresh_every=1)
    first, second = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.5, 0.0]], dtype=F64)
    sampler.record(torch.arange(3), first)
    sampler.draw()
    sampler.record(torch.arange(3), second)
    sampler.draw()
    want = 0.75 * variance_weights(first) + 0.25 * variance_weights(second)
    torch.testing.assert_close(sampler.weights, want)


def test_the_first_weights_are_taken_whole():
    """Whether rollouts are there at the first refresh or come later."""
    sampler = _sampler(4, 2, momentum=0.9, refresh_every=1)
    sampler.draw()
    assert not sampler.weights.any()
    sampler.record(torch.arange(4), RATES)
    sampler.draw()
    assert torch.equal(sampler.weights, variance_weights(RATES))


def test_records_of_some_prompts_leave_the_others():
    sampler = _sampler(4, 4)
    sampler.record(torch.arange(4), RATES, diversity=torch.ones(4))
    sampler.record(torch.tensor([2, 0]), torch.tensor([0.75, 0.125]))
    assert sampler.success_rates.tolist() == [0.125, 0.25, 0.75, 1.0]
    assert sampler.diversity.tolist() == [0, 1, 0, 1]


def test_a_saved_sampler_goes_on_with_the_same_batches():
    sampler, other = _sampler(9, 7), _sampler(9, 7, seed=1)
    sampler.record(torch.arange(9), torch.linspace(0, 1, 9))
    for _ in range(6):
        sampler.draw()
    state = sampler.state_dict()
    want = [sampler.draw() for _ in range(6)]
    sampler.record(torch.arange(9), torch.zeros(9))  # the state is a copy
    other.load_state_dict(state)
    assert all(torch.equal(other.draw(), batch) for batch in want)


def test_equal_seeds_are_equal_batches():
    first, second, third = _sampler(9, 7), _sampler(9, 7), _sampler(9, 7, seed=1)
    batches = [[s.draw().tolist() for _ in range(4)] for s in (first, second, third)]
    assert batches[0] == batches[1] != batches[2]


# ------------------------------------------------------------------ Thompson sampling


def _beta(count=3, seed=0, **options):
    rates = {"decay_recorded": 0.5, "decay_others": 0.75} | options
    return BetaSampler(count, generator=_generator(seed), **rates)


def test_counts_fade_at_two_rates():
    sampler = _beta()
    sampler.record(torch.tensor([0, 1]), torch.tensor([4, 0]), torch.tensor([4, 8]))
    sampler.record(torch.tensor([1]), torch.tensor([2]), torch.tensor([6]))
    assert sampler.successes.tolist() == [3, 2, 0]
    assert sampler.failures.tolist() == [3, 10, 0]
    sampler.record(torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0))
    assert sampler.successes.tolist() == [2.25, 1.5, 0]


def test_draws_are_those_of_the_beta_distribution():
    """The score's mean over draws, against its integral, by which of two prompts it wins."""
    sampler = _beta(2, decay_recorded=1.0, decay_others=1.0)
    successes, failures = torch.tensor([3.0, 30.0]), torch.tensor([7.0, 10.0])
    sampler.record(torch.arange(2), successes, failures)
    wins = torch.cat([sampler.draw(1) for _ in range(4000)]) == 0
    rates = torch.distributions.Beta(successes + 1, failures + 1).sample((40000,))
    scores = rates * (1 - rates) ** 2
    want = (scores[:, 0] > scores[:, 1]).double().mean()
    # Five standard deviations of either estimate.
    bound = 5 * math.sqrt(want * (1 - want) * (1 / 4000 + 1 / 40000))
    assert 0.5 < want < 1 - 1e-3
    assert abs(wins.double().mean() - want) <= bound


def test_sure_beliefs_order_prompts_by_their_score():
    """p (1 - p)^2 of 0.1, 0.35, 0.6 and 0.9: 0.081, 0.148, 0.096, 0.009."""
    rates = torch.tensor([0.1, 0.35, 0.6, 0.9], dtype=F64)
    sampler = _beta(4)
    sampler.record(torch.arange(4), 1e6 * rates, 1e6 * (1 - rates))
    assert sampler.draw(4).tolist() == [1, 2, 0, 3]
    assert sampler.draw(2).tolist() == [1, 2]
    assert sampler.draw(0).shape == (0,)


def test_unknown_prompts_are_explored():
    sampler = _beta(50)
    assert len(torch.cat([sampler.draw(5) for _ in range(60)]).unique()) == 50


def test_a_saved_belief_goes_on_with_the_same_batches():
    sampler, other = _beta(20), _beta(20, seed=1)
    sampler.record(torch.arange(20), torch.arange(20), 20 - torch.arange(20))
    sampler.draw(5)
    state = sampler.state_dict()
    want = [sampler.draw(5) for _ in range(4)]
    sampler.record(torch.arange(20), torch.zeros(20), torch.zeros(20))
    other.load_state_dict(state)
    assert all(torch.equal(other.draw(5), batch) for batch in want)


# ------------------------------------------------------------------ errors


def test_errors():
    sampler, beta, two = _sampler(), _beta(), torch.tensor([0, 1])
    halves, ones = torch.full((2,), 0.5), torch.ones(2)
    cases = {
        r"variance_weights: success_rates: expected numbers in \[0, 1\], got 0": lambda: (
            variance_weights(torch.tensor([0.0, 1.5, math.nan]))
        ),
        r"variance_weights: success_rates: expected \[N\]": lambda: variance_weights(
            torch.zeros(2, 2)
        ),
        "variance_weights: diversity: expected shape": lambda: variance_weights(halves, RATES),
        "variance_weights: diversity_weight: expected at least 0": lambda: variance_weights(
            halves, halves, -1.0
        ),
        "VarianceAwareSampler: num_prompts": lambda: _sampler(0),
        "VarianceAwareSampler: batch_size": lambda: _sampler(4, 0),
        "VarianceAwareSampler: refresh_every": lambda: _sampler(refresh_every=0),
        "VarianceAwareSampler: weighted_share": lambda: _sampler(weighted_share=1.5),
        r"VarianceAwareSampler: momentum: expected a number in \[0, 1\)": lambda: _sampler(
            momentum=1.0
        ),
        r"record: prompts: expected indices in \[0, 4\), got 0 to 4": lambda: sampler.record(
            torch.tensor([0, 4]), halves
        ),
        "record: prompts: expected each prompt once": lambda: sampler.record(
            torch.tensor([1, 1]), halves
        ),
        r"record: prompts: expected integers \[P\], got torch.float32": lambda: sampler.record(
            halves, halves
        ),
        "record: success_rates: expected shape": lambda: sampler.record(two, RATES),
        r"success_rates: expected numbers in": lambda: sampler.record(two, 2 * ones),
        r"VarianceAwareSampler: state\['success_rates'\]: expected \[4\], got \[5\]": lambda: (
            sampler.load_state_dict(_sampler(5).state_dict())
        ),
        "BetaSampler: decay_recorded: expected a number": lambda: _beta(decay_recorded=1.1),
        "BetaSampler: decay_others: expected a number": lambda: _beta(decay_others=-0.1),
        "BetaSampler: prior: expected a number > 0": lambda: _beta(prior=0.0),
        "BetaSampler: num_prompts": lambda: _beta(0),
        "BetaSampler.record: failures: expected counts >= 0": lambda: beta.record(two, ones, -ones),
        "BetaSampler.record: successes: expected shape": lambda: beta.record(two, RATES, ones),
        r"BetaSampler.draw: batch_size: expected a number in \[0, 3\], got 4": lambda: beta.draw(4),
        r"BetaSampler: state\['successes'\]": lambda: beta.load_state_dict(_beta(5).state_dict()),
    }
    for message, function in cases.items():
        with pytest.raises(ValueError, match=message):
            function()
    # A refused record changes nothing.
    assert beta.successes.tolist() == [0, 0, 0]
    assert sampler.success_rates.isnan().all()


@pytest.mark.parametrize("name", ["decay_recorded", "decay_others"])
def test_rates_of_decay_have_no_default(name):
    rates = {"decay_recorded": 0.9, "decay_others": 0.9}
    del rates[name]
    with pytest.raises(TypeError, match=name):
        BetaSampler(3, generator=_generator(), **rates)
