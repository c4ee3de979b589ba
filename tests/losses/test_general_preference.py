"""Published vectors and properties of general preference scores and their policy loss."""

from __future__ import annotations

import math

import pytest
import torch

from fastpo.losses import gpm, gpm_score, gpo, gpo_pair, gpo_scores, rm_bt, rm_margin, sppo_hard

F64 = torch.float64


@pytest.fixture
def embeddings():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 7, 6, dtype=F64, generator=generator).unbind()


def test_gpm_vector(check_vector, vector_dtype):
    chosen = torch.tensor([[1.0, 0.5, -0.3, 0.8]], dtype=vector_dtype)
    rejected = torch.tensor([[0.2, 0.9, 0.4, -0.1]], dtype=vector_dtype)
    check_vector(gpm_score(chosen, rejected), [0.51])
    out = gpm(chosen, rejected)
    check_vector(out.loss, 0.0060782366)
    check_vector(out.chosen_rewards, [5.1])
    check_vector(out.rejected_rewards, [-5.1])
    check_vector(gpm(chosen, rejected, form="regression").loss, 0.5 * (5.1 - 10) ** 2)


def test_score_is_antisymmetric(embeddings):
    first, second = embeddings
    scales = torch.rand(7, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(gpm_score(first, second, scales), -gpm_score(second, first, scales))
    assert not gpm_score(first, first).any()


def test_two_dimensions_hold_bradley_terry(f1):
    chosen, rejected = (torch.stack((x, torch.ones_like(x)), 1) for x in f1.sums[:2])
    torch.testing.assert_close(gpm(chosen, rejected).loss, rm_bt(*f1.sums[:2]).loss)
    margins = f1.ref_chosen
    got = gpm(chosen, rejected, margins=margins).loss
    torch.testing.assert_close(got, rm_margin(*f1.sums[:2], margins).loss)


def test_two_dimensions_hold_a_cycle():
    angle = torch.arange(3, dtype=F64) * (2 * math.pi / 3)
    circle = torch.stack((angle.cos(), angle.sin()), 1)
    scores = gpm_score(circle, circle.roll(-1, 0))
    torch.testing.assert_close(scores, torch.full((3,), math.sqrt(3) / 2, dtype=F64))


def test_scales_weigh_the_planes(embeddings):
    chosen, rejected = embeddings
    planes = [gpm_score(chosen[:, i : i + 2], rejected[:, i : i + 2]) for i in (0, 2, 4)]
    scales = torch.tensor([0.5, 2.0, 0.0], dtype=F64).expand(7, 3)
    got = gpm_score(chosen, rejected, scales)
    torch.testing.assert_close(got, 0.5 * planes[0] + 2 * planes[1])
    torch.testing.assert_close(gpm_score(chosen, rejected), sum(planes))


def test_temperature_depends_on_the_dimensions(embeddings):
    chosen, rejected = embeddings
    torch.testing.assert_close(gpm(chosen, rejected), gpm(chosen, rejected, tau=0.1))
    pair = chosen[:, :2], rejected[:, :2]
    torch.testing.assert_close(gpm(*pair), gpm(*pair, tau=1.0))


def test_gpm_gradients(embeddings):
    tensors = [x.requires_grad_() for x in embeddings]
    scales = torch.ones(7, 3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: gpm(*t, tau=1.0).loss, (*tensors, scales))
    margins = torch.ones(7, dtype=F64, requires_grad=True)
    gpm(*tensors, scales, margins).loss.backward()
    assert margins.grad is None


def test_gpm_errors(embeddings):
    chosen, rejected = embeddings
    with pytest.raises(ValueError, match=r"gpm_score: second: expected \[B, 2k\]"):
        gpm(chosen, rejected[:, :4])
    with pytest.raises(ValueError, match=r"gpm_score: first: expected \[B, 2k\]"):
        gpm(chosen[:, :3], rejected[:, :3])
    with pytest.raises(ValueError, match=r"gpm_score: scales: expected shape \[7, 3\]"):
        gpm(chosen, rejected, torch.ones(3))
    with pytest.raises(ValueError, match="gpm: margins: expected None with regression"):
        gpm(chosen, rejected, margins=torch.ones(7), form="regression")
    with pytest.raises(ValueError, match="gpm: tau: expected a positive"):
        gpm(chosen, rejected, tau=0.0)
    with pytest.raises(ValueError, match="gpm: form: expected one of"):
        gpm(chosen, rejected, form="square")


def test_gpo_pair_vector(f1_cast, check_vector, vector_dtype):
    scores = torch.tensor([[0.4, 0.3, 0.2], [-0.3, -0.1, -0.4]], dtype=vector_dtype)
    out = gpo_pair(*f1_cast.sums, *scores, beta=0.5, reduction="none")
    check_vector(out.loss, [0.185, 0.205, 0.365])
    check_vector(gpo_pair(*f1_cast.sums, *scores, beta=0.5).loss, 0.2516666667)


def test_gpo_pair_with_hard_scores_is_half_of_sppo(f1):
    half = torch.full((3,), 0.5, dtype=F64)
    got = gpo_pair(*f1.sums, half, -half, beta=0.5)
    want = sppo_hard(*f1.sums, beta=0.5)
    torch.testing.assert_close(2 * got.loss, want.loss)
    torch.testing.assert_close(got[1:3], want[1:3])


def test_gpo_of_two_is_gpo_pair(f1):
    scores = torch.tensor([0.4, -0.3], dtype=F64)
    policy, ref = torch.stack(f1.sums[:2], 1), torch.stack(f1.sums[2:], 1)
    got = gpo(policy, ref, scores.expand(3, 2), beta=0.5, reduction="none").loss
    pair = gpo_pair(*f1.sums, *scores[:, None].expand(2, 3), beta=0.5, reduction="none")
    torch.testing.assert_close(got, pair.loss)


def test_gpo_minimum_is_the_tilted_policy():
    ref = torch.tensor([[-1.0, -2.0]], dtype=F64)
    scores = torch.tensor([[0.25, -0.25]], dtype=F64)  # exact in every sum below
    policy = (ref + scores / 0.5).requires_grad_()
    loss = gpo(policy, ref, scores, beta=0.5).loss
    loss.backward()
    assert loss == 0
    assert not policy.grad.any()


def test_scores_of_a_symmetric_game_sum_to_zero():
    table = torch.randn(3, 5, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    scores = gpo_scores(table - table.mT)
    assert scores.sum(1).abs().max() < 1e-14
