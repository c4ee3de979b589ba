"""Sampling budgets: utilities, the exact split and shares."""

from __future__ import annotations

import doctest
import itertools
import math

import pytest

from fastpo.data import budgets
from fastpo.data.budgets import neyman_shares, rollout_budget, rollout_utility, success_pairs

RATES = [0.05, 0.5, 0.9]


def test_examples_run():
    result = doctest.testmod(budgets)
    assert result.attempted > 0
    assert result.failed == 0


def test_published_values():
    got = [rollout_utility(8, rate) for rate in RATES]
    # The last is 0.8 (1 - 1e-7), published as 0.8.
    assert got == pytest.approx([2.2926365497, 3.96875, 0.79999992], rel=0, abs=1e-9)
    split = rollout_budget(RATES, total=24, minimum=2, maximum=16)
    assert split == [16, 6, 2]
    total = sum(map(rollout_utility, split, RATES))
    assert total == pytest.approx(11.2442233016, rel=0, abs=1e-9)
    shares = neyman_shares(RATES)
    assert shares == pytest.approx([0.21410288, 0.4911857, 0.29471142], rel=0, abs=1e-8)


@pytest.mark.parametrize("budget", [0, 1, 2, 5])
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_utility_counts_failures_next_to_a_success(budget, rate):
    """By enumeration of all outcomes."""
    expected = 0.0
    for outcome in itertools.product((0, 1), repeat=budget):
        if any(outcome):
            wins = sum(outcome)
            expected += rate**wins * (1 - rate) ** (budget - wins) * (budget - wins)
    assert rollout_utility(budget, rate) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(
    ("total", "minimum", "maximum"), [(9, 0, 6), (10, 2, 5), (8, 2, 8), (15, 1, 5)]
)
def test_split_is_the_best_of_all(total, minimum, maximum):
    rates = [0.02, 0.4, 0.97]
    splits = itertools.product(range(minimum, maximum + 1), repeat=3)
    value = lambda split: sum(map(rollout_utility, split, rates))
    best = max(value(split) for split in splits if sum(split) == total)
    got = rollout_budget(rates, total, minimum, maximum)
    assert sum(got) == total
    assert all(minimum <= budget <= maximum for budget in got)
    assert value(got) == pytest.approx(best, rel=1e-12)


def test_split_does_not_depend_on_the_order_of_prompts():
    assert rollout_budget(RATES[::-1], total=24) == [2, 6, 16]


def test_many_prompts_and_none():
    rates = [i / 255 for i in range(256)]
    split = rollout_budget(rates, total=2048)
    assert sum(split) == 2048
    assert rollout_budget([], total=0) == []


@pytest.mark.parametrize(("total", "minimum", "maximum"), [(5, 2, 16), (49, 2, 16), (24, 9, 8)])
def test_a_total_out_of_reach_is_an_error(total, minimum, maximum):
    with pytest.raises(ValueError, match=r"rollout_budget: total: expected 3 prompts times .* got"):
        rollout_budget(RATES, total, minimum, maximum)


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_rates_are_probabilities(rate):
    for call in (neyman_shares, lambda rates: rollout_budget(rates, 8)):
        with pytest.raises(ValueError, match=r"success_rates: expected probabilities in \[0, 1\]"):
            call([0.5, rate])
    with pytest.raises(ValueError, match="rollout_utility: success_rates"):
        rollout_utility(4, rate)


def test_shares_of_certain_prompts():
    assert neyman_shares([0.0, 1.0]) == [0.5, 0.5]
    assert neyman_shares([0.0, 0.5, 1.0]) == [0.0, 1.0, 0.0]
    assert neyman_shares([]) == []


def test_pairs_repeat_the_smaller_class():
    assert success_pairs([-1.0, 1.0, -0.2, -3.0]) == [(1, 0), (1, 2), (1, 3)]
    # A reward of 0 has the label 1/2, which counts as a success.
    assert success_pairs([0.0, -0.1]) == [(0, 1)]
    assert success_pairs([1.0, 1.0]) == success_pairs([-1.0]) == success_pairs([]) == []
