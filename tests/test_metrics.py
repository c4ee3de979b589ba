"""Published values and properties of the metrics."""

from __future__ import annotations

import math

import pytest
import torch

import fastpo
from fastpo.metrics import (
    bhattacharyya_angle,
    bhattacharyya_angle_of,
    did_entropy,
    ideal_log_ratios,
    linear_separability,
    pair_difficulty,
    ranking_accuracy,
    reward_accuracy,
    rlhs_utility,
    tail_exponent,
)

# Three pairs: sums of policy and reference, chosen and rejected, and their token counts.
CHOSEN, REJECTED = [-2.5, -3.6, -1.5], [-2.7, -2.1, -4.4]
REF_CHOSEN, REF_REJECTED = [-2.7, -3.7, -1.1], [-2.2, -2.3, -3.9]
COUNTS = torch.tensor([3, 4, 1]), torch.tensor([2, 3, 4])
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5}


@pytest.fixture(params=list(BOUNDS), ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def check(dtype):
    def compare(got, want, scale=1.0):
        want = torch.tensor(want, dtype=dtype)
        torch.testing.assert_close(got, want, rtol=0, atol=scale * BOUNDS[dtype])

    return compare


@pytest.fixture
def pairs(dtype):
    lists = (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)
    return [torch.tensor(x, dtype=dtype) for x in lists]


def test_accuracies(pairs, check):
    chosen, rejected, ref_chosen, ref_rejected = pairs
    check(ranking_accuracy(chosen, rejected), 0.6666666667)
    check(ranking_accuracy(ref_chosen, ref_rejected), 0.3333333333)
    check(reward_accuracy(chosen - ref_chosen, rejected - ref_rejected), 0.6666666667)
    # means -0.83 -0.90 -1.5 against -1.35 -0.70 -1.1
    check(ranking_accuracy(chosen, rejected, *COUNTS), 1 / 3)


def test_ties():
    chosen, rejected = torch.tensor([-1.0, -1.0, -2.0, -1.0]), torch.tensor([-1.0, -1.04, -1.0, -2])
    assert ranking_accuracy(chosen, rejected).item() == 0.5
    # Ratios 1 and 1.041 are ties: one of two is right.
    assert ranking_accuracy(chosen, rejected, tie_band=0.05).item() == 0.5
    assert ranking_accuracy(chosen[:2], rejected[:2], tie_band=0.05).item() == 0
    assert ranking_accuracy(chosen[1:2], rejected[1:2], tie_band=0.03).item() == 1
    assert reward_accuracy(chosen[:1], rejected[:1]).item() == 0


def test_empty_batches():
    none = torch.zeros(0)
    assert ranking_accuracy(none, none) == 0
    assert reward_accuracy(none, none) == 0
    assert ranking_accuracy(none, none, none, none, tie_band=0.1) == 0
    assert ideal_log_ratios(none, none).shape == (0,)


def test_ideal_ratios(pairs, dtype):
    got = ideal_log_ratios(*pairs[2:], agreement=0.7, beta=0.1)
    want = [2901.4868859500, 1179.6565359625, 78666.9662717858]
    # The exponential scales the error by the value: a relative bound.
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got.exp(), torch.tensor(want, dtype=dtype), rtol=bound, atol=0)


def test_ideal_ratios_stay_finite_and_know_the_reference(pairs):
    one_sided = torch.tensor([0.0, 0.5, 1.0])
    got = ideal_log_ratios(*pairs[2:], agreement=one_sided, beta=0.5)
    gap = pairs[2] - pairs[3]
    logit = math.log(0.999 / 0.001) / 0.5
    torch.testing.assert_close(
        got, gap + torch.tensor([-logit, 0, logit]).to(gap), rtol=1e-4, atol=0
    )


def test_pair_difficulty(pairs, check):
    got = pair_difficulty(*pairs[2:], beta=0.5)
    check(got, [0.5759394199, 0.4031860489, 1.6204174099])
    # Once the loss of a pair is below, and not before, its ranking is right.
    _, _, ref_chosen, ref_rejected = pairs
    for shift in (-1e-3, 1e-3):
        rejected = torch.full_like(ref_chosen, -3.0)
        loss = fastpo.losses.dpo(
            rejected + shift, rejected, ref_chosen, ref_rejected, beta=0.5, reduction="none"
        ).loss
        assert ((loss < got) == (shift > 0)).all()


def test_did(check, dtype):
    policy, ref = (torch.tensor(x, dtype=dtype) for x in ([0.5, 0.3, 0.2], [0.2, 0.5, 0.3]))
    ratios = policy.log() - ref.log()
    check(ratios.softmax(0), [0.6637168142, 0.1592920354, 0.1769911504])
    check(did_entropy(ratios), 0.8711670609)
    # Samples that are all responses, from a uniform proposal: exact.
    uniform = torch.full((3,), 1 / 3, dtype=dtype).log()
    check(did_entropy(ratios, uniform), 0.8711670609)
    # Adding a constant (the prompt's partition function) changes nothing.
    check(did_entropy(ratios + 5), 0.8711670609)
    batch = torch.stack((ratios, torch.zeros_like(ratios)))
    check(did_entropy(batch), [0.8711670609, math.log(3)])


def test_did_from_samples_of_the_reference():
    generator = torch.Generator().manual_seed(0)
    policy, ref = (x.double() for x in torch.rand(2, 8, generator=generator).softmax(1))
    exact = did_entropy(policy.log() - ref.log())
    drawn = torch.multinomial(ref, 100_000, replacement=True, generator=generator)
    got = did_entropy((policy.log() - ref.log())[drawn], ref.log()[drawn])
    assert got.item() == pytest.approx(exact.item(), abs=0.01)


def test_did_with_an_impossible_response():
    ratios = torch.tensor([0.0, 0.0, -math.inf])
    assert did_entropy(ratios).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_tail_exponent_of_a_power_law(exponent, share):
    """sigma_k = k^-a has the exponent a, whatever is taken as its tail."""
    values = torch.arange(1, 201, dtype=torch.float64) ** -exponent
    mixed = values[torch.randperm(200)]
    assert tail_exponent(mixed, share).item() == pytest.approx(exponent)
    assert tail_exponent(7 * mixed, share).item() == pytest.approx(exponent)


def test_tail_exponent_looks_at_the_small_modes():
    """A spectrum that falls like k^-1/2 for ten values and like k^-2 after them."""
    ranks = torch.arange(1, 101, dtype=torch.float64)
    values = torch.where(ranks <= 10, ranks**-0.5, 10**1.5 * ranks**-2)
    assert tail_exponent(values, 0.9).item() == pytest.approx(2.0)
    assert 0.5 < tail_exponent(values, 1.0).item() < 2.0


def test_tail_exponent_of_the_hidden_states_of_a_layer():
    left, _ = torch.linalg.qr(torch.randn(40, 20, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))
    hidden = left * torch.arange(1, 21, dtype=torch.float64) ** -2 @ right.T
    got = tail_exponent(torch.linalg.svdvals(torch.stack((hidden, 3 * hidden))))
    torch.testing.assert_close(got, torch.tensor([2.0, 2.0], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"tail_exponent: singular_values, share: expected two"):
        tail_exponent(torch.linalg.svdvals(hidden), 0.0)


def test_bhattacharyya_angle(check, dtype):
    p, q = (torch.tensor(x, dtype=dtype) for x in ([0.7, 0.2, 0.1], [0.5, 0.3, 0.2]))
    check(bhattacharyya_angle(p.log(), q.log()), 0.4205044116)
    divergence = 4 * (1 - (p * q).sqrt().sum())
    # 1 - BC cancels: in float32 its rounding is magnified by 1 / sin of the half angle.
    check(bhattacharyya_angle_of(divergence), 0.4205044116, scale=4)
    apart = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]], dtype=dtype)
    check(bhattacharyya_angle(*apart), math.pi)
    check(bhattacharyya_angle(p.log(), p.log()), 0.0)


def test_bhattacharyya_angle_from_the_kernel():
    hidden, ref = torch.randn(2, 7, 5, dtype=torch.float64)
    head = torch.randn(11, 5, dtype=torch.float64)
    divergence = fastpo.linear_divergence(hidden, head, ref, head, kind="alpha", alpha=0.5)
    want = bhattacharyya_angle((hidden @ head.T).log_softmax(1), (ref @ head.T).log_softmax(1))
    torch.testing.assert_close(bhattacharyya_angle_of(divergence), want)
    # Where distributions nearly agree an arccos of their overlap has no digit left.
    near = fastpo.linear_divergence(hidden, head, hidden + 1e-9, head, kind="alpha", alpha=0.5)
    close = bhattacharyya_angle_of(near)
    further = fastpo.linear_divergence(hidden, head, hidden + 2e-9, head, kind="alpha", alpha=0.5)
    torch.testing.assert_close(bhattacharyya_angle_of(further), 2 * close, rtol=1e-4, atol=0)


def test_separability_finds_a_direction_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 200, 16, generator=generator)
    direction = torch.randn(16, generator=generator)
    direction /= direction.norm()
    chance = 5 * math.sqrt(0.25 / 400)
    assert abs(linear_separability(*noise) - 0.5) < chance
    apart = linear_separability(noise[0] + 6 * direction, noise[1] - 6 * direction)
    assert apart == 1
    # Normal clouds at +-1 along a line: the best line is right with probability Phi(1) = 0.841.
    shifted = linear_separability(noise[0] + direction, noise[1] - direction)
    assert abs(shifted - 0.8413) < chance


def test_separability_does_not_learn_what_it_is_tested_on():
    """More dimensions than pairs: a probe fits its own sample perfectly, whatever the labels."""
    noise = torch.randn(2, 60, 500, generator=torch.Generator().manual_seed(1))
    assert abs(linear_separability(*noise) - 0.5) < 5 * math.sqrt(0.25 / 120)


def test_separability_of_equal_pairs_is_chance():
    same = torch.randn(10, 4)
    assert linear_separability(same, same).item() == 0.5
    assert linear_separability(torch.zeros(4, 3), torch.zeros(4, 3), folds=2).item() == 0.5


def test_separability_is_blind_to_shift_and_scale():
    chosen, rejected = torch.randn(2, 40, 6, dtype=torch.float64)
    chosen = chosen + 0.5
    want = linear_separability(chosen, rejected)
    assert torch.equal(linear_separability(1e3 * chosen + 7, 1e3 * rejected + 7), want)


def test_rlhs_utility():
    paid = torch.tensor([1000.0, 800.0, 500.0, 0.0])
    bought, meets = torch.tensor([1, 1, 1, 0]).bool(), torch.tensor([1, 1, 0, 0]).bool()
    got = rlhs_utility(paid, torch.full((4,), 800.0), bought, meets)
    torch.testing.assert_close(got, torch.tensor([0.8, 1.0, -1.0, 0.0]))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(narrow):
    values = torch.randn(2, 12).to(narrow)
    for function in (pair_difficulty, ideal_log_ratios, ranking_accuracy, reward_accuracy):
        got = function(*values)
        assert got.dtype == torch.float32
        assert torch.equal(got, function(*values.float()))


def test_nothing_carries_a_gradient():
    values = torch.randn(2, 12, requires_grad=True)
    results = [
        ranking_accuracy(*values),
        ideal_log_ratios(*values),
        pair_difficulty(*values),
        did_entropy(values),
        did_entropy(values, values),
        tail_exponent(values.exp()),
        bhattacharyya_angle(values.log_softmax(1), values.log_softmax(1)),
        linear_separability(values.view(2, 4, 3)[0], values.view(2, 4, 3)[1], folds=2),
    ]
    assert not any(x.requires_grad for x in results)


def test_errors():
    three, two = torch.zeros(3), torch.zeros(2)
    cases = {
        "ranking_accuracy: rejected: expected [3] as chosen, got [2]": lambda: ranking_accuracy(
            three, two
        ),
        "chosen_counts, rejected_counts: expected both or none": lambda: ranking_accuracy(
            three, three, three
        ),
        "ideal_log_ratios: beta: expected a positive finite number": lambda: ideal_log_ratios(
            three, three, beta=0.0
        ),
        "linear_separability: chosen: expected [B, H], got [3]": lambda: linear_separability(
            three, three
        ),
        "linear_separability: folds, ridge: expected 2 to 3 folds": lambda: linear_separability(
            three[:, None], three[:, None]
        ),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=r"^fastpo\.metrics\.") as error:
            call()
        assert message in str(error.value)
