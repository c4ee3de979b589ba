"""Published vectors and properties of the regret model of preferences."""

from __future__ import annotations

import math

import pytest
import torch

from fastpo.losses import dpo, optimal_values, regret_pref

F64 = torch.float64
# Returns, then V* at start and end of each segment.
VALUES = [1.2, 0.6, 2.0, 0.5, 1.7, 0.2]


@pytest.fixture
def segments(vector_dtype):
    return [torch.tensor([value], dtype=vector_dtype) for value in VALUES]


def test_regret_vector(segments, check_vector):
    out = regret_pref(*segments)
    check_vector(out.loss, 0.4374879505)
    check_vector(-out.chosen_rewards, [0.3])
    check_vector(-out.rejected_rewards, [0.9])
    check_vector(torch.exp(-out.loss), 0.6456563062)
    check_vector(regret_pref(*segments, label=0.5).loss, 0.7374879505)
    check_vector(regret_pref(*segments, label=torch.tensor([0.5])).loss, 0.7374879505)


def test_optimal_values_vector(check_vector, vector_dtype):
    features = torch.tensor([[1.0], [1.002], [0.99]], dtype=vector_dtype)
    check_vector(optimal_values(features, torch.ones(1, dtype=vector_dtype)), 1.0017615305)


def test_optimal_values_are_not_rounded_by_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        got = optimal_values(torch.tensor([[1.0], [2.003]]), torch.ones(1))
    torch.testing.assert_close(got, torch.tensor(2.003))


def test_optimal_values_go_from_mean_to_maximum():
    features = torch.randn(4, 3, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0.5, -1.0], dtype=F64)
    values = features @ weights
    torch.testing.assert_close(optimal_values(features, weights, 1e-9), values.max(1).values)
    hot = optimal_values(features, weights, 1e9)
    torch.testing.assert_close(hot, values.mean(1))
    assert torch.autograd.gradcheck(
        lambda f, w: optimal_values(f, w, 0.5),
        (features.requires_grad_(), weights.requires_grad_()),
    )


def test_partial_return_on_log_ratios_is_dpo(f1):
    """With beta log(policy / reference) in the place of the optimal advantage."""
    chosen, rejected, ref_chosen, ref_rejected = f1.sums
    returns = 0.5 * (chosen - ref_chosen), 0.5 * (rejected - ref_rejected)
    got = regret_pref(*returns, model="partial_return", label=0.8)
    torch.testing.assert_close(got.loss, dpo(*f1.sums, beta=0.5, label_smoothing=0.2).loss)


def test_without_value_weights_regret_is_partial_return(f1):
    values = f1.sums[2:] * 2
    got = regret_pref(*f1.sums[:2], *values, weights=(0.5, 0.0, 0.0))
    want = regret_pref(*f1.sums[:2], model="partial_return", weights=(0.5, 1.0, 1.0))
    torch.testing.assert_close(got, want)


def test_swapping_segments_and_label_changes_nothing(f1):
    values = (*f1.sums, *f1.sums[2:])
    label = torch.tensor([0.9, 0.5, 0.0], dtype=F64)
    first, second, *states = values
    got = regret_pref(second, first, *states[2:], *states[:2], label=1 - label).loss
    torch.testing.assert_close(got, regret_pref(*values, label=label).loss)


def test_gradient_reaches_returns_and_values_but_no_label(f1):
    tensors = [x.clone().requires_grad_() for x in (*f1.sums, *f1.sums[2:])]
    label = torch.full((3,), 0.9, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: regret_pref(*t, label=label).loss, tensors)
    regret_pref(*tensors, label=label).loss.backward()
    assert label.grad is None
    # One more unit of return is one less unit of V* at the start.
    torch.testing.assert_close(tensors[0].grad, -tensors[2].grad)
    torch.testing.assert_close(tensors[0].grad, tensors[3].grad)


def test_errors(f1):
    pair = f1.sums[:2]
    with pytest.raises(
        ValueError, match=r"regret_pref: chosen_starts.*: expected four .* got 0 of"
    ):
        regret_pref(*pair)
    with pytest.raises(ValueError, match="none with partial_return, got 1 of them"):
        regret_pref(*pair, f1.ref_chosen, model="partial_return")
    with pytest.raises(ValueError, match="regret_pref: model: expected one of"):
        regret_pref(*pair, model="stochastic")
    with pytest.raises(ValueError, match=r"regret_pref: label: expected a number in \[0, 1\]"):
        regret_pref(*pair, model="partial_return", label=1.5)
    with pytest.raises(ValueError, match="regret_pref: weights: expected a finite number"):
        regret_pref(*pair, model="partial_return", weights=(math.nan, 1.0, 1.0))
    with pytest.raises(
        ValueError, match=r"optimal_values: features, weights: expected \[..., K, F\]"
    ):
        optimal_values(torch.ones(3, 2), torch.ones(3))
    with pytest.raises(ValueError, match="optimal_values: temperature: expected a positive"):
        optimal_values(torch.ones(3, 2), torch.ones(2), 0.0)
