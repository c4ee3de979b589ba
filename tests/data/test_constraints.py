"""CGPO's selections: the two slips of the public code do not happen, edge cases."""

from __future__ import annotations

import pytest
import torch

from fastpo.data.constraints import constrained_pairs, crraft_choice

NAN = float("nan")


def _pairs(scores, passed):
    pairs = constrained_pairs(torch.tensor([scores]), torch.tensor([passed]))
    return list(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True))


@pytest.mark.parametrize(
    ("scores", "passed", "want"),
    [
        ([1.0, 0.2, -0.5, 0.7], [True, True, False, True], [(0, 2)]),
        # A failing response is not chosen, however negative the passing one: 0 * 0.5 > -1.
        ([-1.0, 0.5, -2.0], [True, False, True], [(0, 1)]),
        # A passing response is not rejected, however low: 0 * -2 < 0.5, and 0 < 0.5 again.
        ([-1.0, 0.5, -2.0, 0.9], [True, False, True, False], [(0, 1)]),
        # All pass: the worst of all.
        ([0.1, -3.0, 2.0], [True, True, True], [(2, 1)]),
        # None passes: no pair.
        ([0.1, -3.0, 2.0], [False, False, False], []),
        # Ties go to the first; equal scores that all pass leave one response on both sides.
        ([1.0, 1.0, 0.0, 0.0], [True, True, False, False], [(0, 2)]),
        ([1.0, 1.0], [True, True], [(0, 0)]),
        # A response without a score is never taken, nor does it count as failing.
        ([NAN, 0.5, -1.0], [True, True, False], [(1, 2)]),
        ([NAN, 0.5, 1.0], [False, True, True], [(2, 1)]),
        ([NAN, 0.5], [True, False], []),
        ([-torch.inf, 0.5], [True, False], [(0, 1)]),
    ],
)
def test_constrained_pairs(scores, passed, want):
    assert _pairs(scores, passed) == want


def test_prompts_without_a_pair_are_dropped():
    scores = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    passed = torch.tensor([[True, False], [False, False], [False, True]])
    pairs = constrained_pairs(scores, passed)
    assert pairs.prompt.tolist() == [0, 2]
    assert pairs.chosen.tolist() == [0, 1]
    assert constrained_pairs(scores[:0], passed[:0]).num_pairs == 0


def _choice(passed, kl, **baseline):
    scores = torch.tensor([[1.0, 0.2, -0.5, 0.7]], dtype=torch.float64)
    half = torch.tensor([0.3], dtype=torch.float64)
    baseline = {name: torch.tensor([value]) for name, value in baseline.items()}
    kl = torch.tensor([kl], dtype=torch.float64)
    column, weight = crraft_choice(scores, half, torch.tensor([passed]), kl, 10.0, **baseline)
    return column.item(), weight.item()


@pytest.mark.parametrize(
    ("passed", "kl", "baseline", "want"),
    [
        ([True, True, False, True], [2, 8, 1, 12], {}, (0, 0.668187772168)),
        ([False, True, False, True], [2, 8, 1, 12], {}, (1, 0.475020812521)),
        # The limit itself is allowed.
        ([False, True, False, True], [2, 8, 1, 10], {}, (3, 0.598687660112)),
        ([False] * 4, [2, 8, 1, 12], {}, (0, 0.0)),
        ([False] * 4, [2, 8, 1, 12], {"baseline_passed": True, "baseline_kl": 3.0}, (4, 0.5)),
        ([False] * 4, [2, 8, 1, 12], {"baseline_passed": False, "baseline_kl": 3.0}, (0, 0.0)),
        ([False] * 4, [2, 8, 1, 12], {"baseline_passed": True, "baseline_kl": 11.0}, (0, 0.0)),
        (
            [True] * 4,
            [2, 8, 1, 12],
            {"baseline_passed": True, "baseline_kl": 3.0},
            (0, 0.668187772168),
        ),
    ],
)
def test_crraft_choice(passed, kl, baseline, want):
    column, weight = _choice(passed, kl, **baseline)
    assert column == want[0]
    assert weight == pytest.approx(want[1], abs=1e-9)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda x: constrained_pairs(x[0], x > 0),
            r"constrained_pairs: scores: expected \[B, K\], got \[2\]",
        ),
        (
            lambda x: constrained_pairs(x, x),
            r"constrained_pairs: passed: expected bool \[1, 2\], got torch.float32",
        ),
        (
            lambda x: crraft_choice(x, x[0], x > 0, x, 1.0),
            r"crraft_choice: baseline_scores: expected shape \[1\]",
        ),
        (
            lambda x: crraft_choice(x, x[:, 0], x > 0, x, 1.0, baseline_kl=x[:, 0]),
            "crraft_choice: baseline_passed: expected it and baseline_kl, got one of them",
        ),
    ],
)
def test_errors_name_what_came(call, match):
    with pytest.raises(ValueError, match=match):
        call(torch.ones(1, 2))
