"""Published vectors and properties of the losses of reward models and success predictors."""

from __future__ import annotations

import math

import pytest
import torch

from fastpo.losses import (
    flip_weakest,
    preference_strength,
    rm_bt,
    rm_center,
    rm_margin,
    rm_secrets2,
    soft_logistic,
    v0,
)

F64 = torch.float64
# Ten reward models' scores of one pair: a row of the released data set hh-rlhf-strength-cleaned.
CHOSEN = [
    3.71875, 0.58984375, 3.390625, 0.006805419921875, -0.6953125,
    1.0390625, 1.4140625, 0.8359375, 3.078125, 2.0,
]  # fmt: skip
REJECTED = [
    3.546875, 0.9921875, 2.125, -0.330078125, 1.171875,
    1.2578125, 1.078125, 1.0546875, 3.546875, 2.265625,
]  # fmt: skip


@pytest.fixture
def scores(vector_dtype):
    return torch.tensor([[1.2, 0.3, -0.5], [0.4, 0.6, -1.0]], dtype=vector_dtype)


def test_reward_model_vectors(scores, check_vector):
    margins = torch.tensor([0.2, 0.0, 0.5], dtype=scores.dtype)
    check_vector(rm_bt(*scores).loss, 0.5665109649)
    check_vector(rm_margin(*scores, margins).loss, 0.6616634585)
    check_vector(rm_center(*scores).loss, 0.5852442982)
    check_vector(rm_bt(*scores).chosen_rewards, [1.2, 0.3, -0.5])
    check_vector(rm_bt(*scores).rejected_rewards, [0.4, 0.6, -1.0])


def _cross_entropy(margins, smoothing):
    p = torch.sigmoid(margins)
    return -((1 - smoothing) * p.log() + smoothing * (1 - p).log())


def test_secrets2_vectors(scores, check_vector):
    """The second of three pairs has a strength below 0, and alone is smoothed beside its margin."""
    strengths = torch.tensor([0.9, -0.4, 0.2], dtype=scores.dtype)
    check_vector(rm_secrets2(*scores, strengths, form="hard").loss, 0.5665109649)
    got = rm_secrets2(*scores, strengths, form="adaptive_margin").loss
    check_vector(got, 0.6477161882)
    margins = torch.tensor([0.8, -0.3, 0.5], dtype=F64)  # of the scores above
    with_mu = margins - torch.tensor([0.9, -0.4, 0.2], dtype=F64)
    a = torch.tensor([0.0, 0.3, 0.0], dtype=F64)
    got = rm_secrets2(*scores, strengths, smoothing=0.3, reduction="none").loss
    check_vector(got, _cross_entropy(with_mu, a).tolist())
    check_vector(rm_secrets2(*scores, strengths).loss, 0.6477161882 + 0.1 * 0.1 / 3)
    # Equation 5: one constant on all pairs, whatever their strengths.
    got = rm_secrets2(*scores, strengths, form="label_smoothing", smoothing=0.3, reduction="none")
    check_vector(got.loss, _cross_entropy(margins, 0.3).tolist())


def test_preference_strength_vector(check_vector, vector_dtype):
    """Equation 4 divides both sums by the number of models: 0.79685 is with one less."""
    chosen, rejected = (torch.tensor([x], dtype=vector_dtype) for x in (CHOSEN, REJECTED))
    mean, deviation = preference_strength(chosen, rejected)
    check_vector(mean, [-0.1331085205])
    check_vector(deviation, [0.7968527943 * math.sqrt(0.9)])


def test_v0_vector(check_vector, vector_dtype):
    scores = torch.tensor([[1.2, -0.3], [0.4, 0.5]], dtype=vector_dtype)
    out = v0(*scores)
    check_vector(out.loss, 0.7561620318)
    check_vector(out.metrics["rank"], 0.7711006659)
    check_vector(out.metrics["cross_entropy"], 0.7511824871)


def test_margins_of_zero_change_nothing(f1):
    pair = f1.sums[:2]
    zero = torch.zeros(3, dtype=F64)
    assert torch.equal(rm_margin(*pair, zero).loss, rm_bt(*pair).loss)
    assert torch.equal(rm_center(*pair, coefficient=0.0).loss, rm_bt(*pair).loss)


def test_centre_adds_to_the_margin(f1):
    pair, margins = f1.sums[:2], f1.ref_chosen
    got = rm_center(*pair, margins, coefficient=0.2).loss
    want = rm_margin(*pair, margins).loss + 0.2 * (pair[0] + pair[1]).square().mean()
    torch.testing.assert_close(got, want)


def test_an_offset_of_all_scores_moves_the_centre_alone(f1):
    chosen, rejected = f1.sums[:2]
    torch.testing.assert_close(rm_bt(chosen + 3, rejected + 3).loss, rm_bt(chosen, rejected).loss)
    assert rm_center(chosen + 3, rejected + 3).loss != rm_center(chosen, rejected).loss


def test_margins_and_strengths_get_no_gradient(f1):
    chosen, rejected = (x.clone().requires_grad_() for x in f1.sums[:2])
    extra = torch.ones(3, dtype=F64, requires_grad=True)
    loss = rm_margin(chosen, rejected, extra).loss + rm_center(chosen, rejected, extra).loss
    for form in ("soft_label_margin", "adaptive_margin"):
        loss = loss + rm_secrets2(chosen, rejected, extra, form=form).loss
    loss.backward()
    assert extra.grad is None


def test_flipping_swaps_the_pair(f1):
    chosen, rejected, strengths, _ = f1.sums
    flipped = torch.tensor([False, True, True])
    for form in ("soft_label_margin", "label_smoothing", "adaptive_margin", "hard"):
        options = dict(form=form, reduction="none")
        got = rm_secrets2(chosen, rejected, strengths, flipped=flipped, **options)
        plain = rm_secrets2(chosen, rejected, strengths, **options)
        swapped = rm_secrets2(rejected, chosen, -strengths, **options)
        torch.testing.assert_close(got.loss, torch.where(flipped, swapped.loss, plain.loss))
        assert torch.equal(got.chosen_rewards, chosen)


def test_secrets2_of_strengths_of_zero_is_bradley_terry(f1):
    want = rm_bt(*f1.sums[:2]).loss
    strengths = torch.zeros(3, dtype=F64)
    for form in ("soft_label_margin", "adaptive_margin"):
        torch.testing.assert_close(rm_secrets2(*f1.sums[:2], strengths, form=form).loss, want)
    got = rm_secrets2(*f1.sums[:2], strengths, form="label_smoothing", smoothing=0.0).loss
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("fraction", "flips"), [(0.0, []), (0.2, [3]), (0.59, [1, 3]), (1.0, None)]
)
def test_flip_weakest(fraction, flips):
    strengths = torch.tensor([0.3, -0.1, 0.0, -2.0, 1.0])
    flipped = flip_weakest(strengths, fraction)
    assert flipped.nonzero()[:, 0].tolist() == (list(range(5)) if flips is None else flips)


def test_flip_weakest_does_not_lose_a_pair_to_rounding():
    assert flip_weakest(torch.arange(100.0), 0.29).sum() == 29  # 0.29 * 100 is 28.999...


def test_flip_weakest_of_ties_goes_by_position():
    assert flip_weakest(torch.zeros(4), 0.5).tolist() == [True, True, False, False]


def test_v0_offset_of_a_context_leaves_the_ranking_alone(f1):
    chosen, rejected = f1.sums[:2]
    got, want = v0(chosen + 3, rejected + 3).metrics, v0(chosen, rejected).metrics
    torch.testing.assert_close(got["rank"], want["rank"])
    assert got["cross_entropy"] != want["cross_entropy"]


def test_v0_without_ranking_is_soft_cross_entropy(f1):
    chosen, rejected = f1.sums[:2]
    labels = torch.tensor([0.9, 0.6, 1.0], dtype=F64), torch.tensor([0.1, 0.4, 0.0], dtype=F64)
    queries, targets = torch.cat((chosen, rejected)), torch.cat(labels)
    want = soft_logistic(queries, targets).mean()
    torch.testing.assert_close(v0(chosen, rejected, *labels, alpha=0.0).loss, want)
    torch.testing.assert_close(v0(chosen, rejected, alpha=1.0).loss, rm_bt(chosen, rejected).loss)
    binary = torch.nn.functional.binary_cross_entropy_with_logits(queries, targets)
    torch.testing.assert_close(want, binary)


def test_v0_labels_get_no_gradient(f1):
    labels = torch.full((3,), 0.9, dtype=F64, requires_grad=True)
    chosen = f1.policy_chosen.clone().requires_grad_()
    v0(chosen, f1.policy_rejected, labels).loss.backward()
    assert labels.grad is None


def test_errors(f1):
    pair = f1.sums[:2]
    with pytest.raises(ValueError, match=r"rm_bt: rejected_scores: expected shape \[3\]"):
        rm_bt(pair[0], pair[1][:2])
    with pytest.raises(ValueError, match="rm_center: coefficient: expected a finite number >= 0"):
        rm_center(*pair, coefficient=-1.0)
    with pytest.raises(ValueError, match="rm_secrets2: form: expected one of"):
        rm_secrets2(*pair, pair[0], form="meta")
    with pytest.raises(ValueError, match="rm_secrets2: smoothing: expected none with form='hard'"):
        rm_secrets2(*pair, pair[0], form="hard", smoothing=0.1)
    with pytest.raises(ValueError, match=r"rm_secrets2: flipped: expected torch.bool \[3\]"):
        rm_secrets2(*pair, pair[0], flipped=pair[0])
    with pytest.raises(ValueError, match=r"preference_strength: .* expected \[B, M\]"):
        preference_strength(*pair)
    with pytest.raises(ValueError, match=r"preference_strength: .* got \[3, 1\]"):
        preference_strength(*(scores[:, None] for scores in pair))
    with pytest.raises(ValueError, match=r"flip_weakest: fraction: expected a number in \[0, 1\]"):
        flip_weakest(pair[0], math.nan)
    with pytest.raises(ValueError, match=r"v0: alpha: expected a number in \[0, 1\]"):
        v0(*pair, alpha=1.5)
