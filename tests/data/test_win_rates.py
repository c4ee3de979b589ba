import pytest
import torch

from fastpo.data.win_rates import (
    bradley_terry_matrix,
    judge_strengths,
    sampled_win_rates,
    win_rates,
)

NAN = float("nan")
CYCLE = [[0.5, 0.8, 0.3], [0.2, 0.5, 0.9], [0.7, 0.1, 0.5]]
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", BOUNDS)
def test_published_vectors(dtype):
    def check(got, want):
        want = torch.tensor(want, dtype=dtype)
        torch.testing.assert_close(got, want, rtol=0, atol=BOUNDS[dtype])

    matrix = bradley_terry_matrix(torch.tensor([1.2, -0.3, 0.5], dtype=dtype))
    check(win_rates(matrix, include_self=True), [0.661920749454, 0.330817014226, 0.50726223632])
    check(win_rates(matrix), [0.742881124181, 0.246225521339, 0.51089335448])
    check(win_rates(torch.tensor(CYCLE, dtype=dtype)), [0.55, 0.55, 0.4])
    # General preferences: the mean score with the self term of 0.
    scores = torch.tensor([[0, 0.6, -0.2], [-0.6, 0, 0.4], [0.2, -0.4, 0]], dtype=dtype)
    check(win_rates(scores, include_self=True), [0.1333333333, -0.0666666667, -0.0666666667])


def test_a_game_has_mean_rate_one_half_and_a_cycle_equal_rates():
    matrix = bradley_terry_matrix(torch.randn(4, 5, dtype=torch.float64))
    torch.testing.assert_close(matrix + matrix.mT, torch.ones_like(matrix))
    for include_self in (False, True):
        mean = win_rates(matrix, include_self).mean(-1)
        torch.testing.assert_close(mean, torch.full_like(mean, 0.5))
    cycle = torch.tensor([[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]])
    assert win_rates(cycle).tolist() == win_rates(cycle, include_self=True).tolist() == [0.5] * 3


def test_unscored_responses_are_nobody_s_opponent():
    scores = torch.tensor([[1.0, NAN, 0.0], [NAN, NAN, 2.0]], dtype=torch.float64)
    rates = win_rates(bradley_terry_matrix(scores))
    alone = win_rates(bradley_terry_matrix(torch.tensor([1.0, 0.0], dtype=torch.float64)))
    torch.testing.assert_close(rates[0, [0, 2]], alone, rtol=0, atol=0)
    assert rates[0, 1].isnan()
    assert rates[1].isnan().all()


@pytest.mark.parametrize("shape", [(1, 1), (0, 0), (0, 3, 3), (2, 1, 1)])
def test_no_opponent_gives_no_rate(shape):
    rates = win_rates(torch.full(shape, 0.5))
    assert rates.shape == shape[:-1]
    assert rates.isnan().all()


def test_integer_and_narrow_scores_are_widened():
    assert bradley_terry_matrix(torch.tensor([1, 0])).dtype == torch.float64
    assert win_rates(torch.full((2, 2), 0.5, dtype=torch.bfloat16)).dtype == torch.float32


def test_drawn_rates_are_seen_from_both_sides_and_have_the_right_mean():
    matrix = torch.tensor(CYCLE, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = 20_000
    drawn = sampled_win_rates(matrix.expand(draws, 3, 3), generator)
    assert set(drawn.unique().tolist()) == {0.0, 0.5, 1.0}
    torch.testing.assert_close(drawn.mean(1), torch.full((draws,), 0.5, dtype=torch.float64))
    # Two draws of variance at most 1/4 each, halved: six standard errors.
    bound = 6 * (1 / 8 / draws) ** 0.5
    torch.testing.assert_close(drawn.mean(0), win_rates(matrix), rtol=0, atol=bound)
    again = sampled_win_rates(matrix.expand(draws, 3, 3), torch.Generator().manual_seed(0))
    assert torch.equal(again, drawn)


def test_an_unknown_comparison_changes_no_other_draw():
    matrix = torch.full((3, 3), 0.5)
    known = sampled_win_rates(matrix.clone(), torch.Generator().manual_seed(1))
    matrix[0, 1] = NAN
    partly = sampled_win_rates(matrix, torch.Generator().manual_seed(1))
    # Response 2 met both in each case, and the two others met only it.
    assert partly[2] == known[2] == 1 - (partly[0] + partly[1]) / 2


def test_strengths_undo_the_bias_of_the_position():
    true = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    fair = judge_strengths(true, torch.zeros_like(true))
    torch.testing.assert_close(fair, torch.sigmoid(true))
    # A judge that always prefers the first option knows nothing.
    blind = judge_strengths(torch.full((2, 2), 3.0), torch.zeros(2, 2))
    torch.testing.assert_close(blind, torch.full((2, 2), 0.5))
    asked_once = judge_strengths(torch.tensor([[0.0, NAN], [1.0, 0.0]]), torch.zeros(2, 2))
    assert asked_once.isnan().tolist() == [[False, True], [True, False]]
    logits = torch.randn(3, 4, 4, dtype=torch.float64)
    strengths = judge_strengths(logits, torch.randn(3, 4, 4, dtype=torch.float64))
    torch.testing.assert_close(strengths + strengths.mT, torch.ones_like(strengths))


def test_errors():
    for rule in (win_rates, lambda p: sampled_win_rates(p, torch.Generator())):
        with pytest.raises(ValueError, match=r"preferences: expected \[..., K, K\], got \[2, 3\]"):
            rule(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="second_logprobs: expected shape"):
        judge_strengths(torch.zeros(2, 2), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="scores: expected"):
        bradley_terry_matrix(torch.tensor(1.0))
