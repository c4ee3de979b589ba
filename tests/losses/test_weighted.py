"""Published vectors and properties of the losses that weigh pairs."""

from __future__ import annotations

import math

import pytest
import torch

from fastpo.losses import beta_dpo, cpo, dpo, ipo, madpo, re_po, simpo, wpo
from fastpo.weights import BetaDPO, RePO, madpo_weights

SCORES = torch.tensor([0.5, 3.0, -2.5]), torch.zeros(3)


def test_madpo(f1_cast, vector_dtype, check_vector):
    scores = [x.to(vector_dtype) for x in SCORES]
    options = dict(threshold=2.0, c_max=2.0)
    check_vector(madpo_weights(*scores, **options), [1.0976032554, 0.9449883273, 1.0])
    out = madpo(*f1_cast.sums, *scores, **options, beta=0.5, reduction="none")
    check_vector(out.loss, [0.5854419901, 0.6789359810, 0.6684596480])
    out = madpo(*f1_cast.sums, *scores, **options, beta=0.5)
    check_vector(out.loss, 0.6442792064)
    check_vector(out.metrics["weights"], (1.0976032554 + 0.9449883273 + 1) / 3)


def test_madpo_without_amplification_is_dpo(f1):
    assert torch.equal(madpo(*f1.sums, *SCORES, c_max=1.0).loss, dpo(*f1.sums).loss)


@pytest.mark.parametrize("loss", [madpo, wpo])
def test_weights_get_no_gradient(loss, f1):
    others = [x.double().abs().requires_grad_() for x in SCORES]
    policy = [x.clone().requires_grad_() for x in f1.sums[:2]]
    loss(*policy, *f1.sums[2:], *others).loss.backward()
    assert all(x.grad is None for x in others)


def test_wpo_multiplies_both_weights(f1):
    weights = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([3.0, 1.0, 0.25])
    out = wpo(*f1.sums, *weights, reduction="none")
    plain = dpo(*f1.sums, reduction="none").loss
    torch.testing.assert_close(out.loss, plain * torch.tensor([1.5, 1.0, 0.5]))
    assert out.metrics["weights"].item() == 1.0


def test_beta_dpo(f1_cast, vector_dtype, check_vector):
    batch = BetaDPO(beta=0.5, drop_share=0.0).double()
    margins = torch.tensor([0.7, -0.1, 0.1], dtype=torch.float64)
    batch.gap_mean.fill_((0.1 - 0.1 * margins.mean()) / 0.9)  # 0.1 once this batch is taken in
    state = batch(margins)
    check_vector(state.beta.to(vector_dtype), 0.5400000000)
    assert state.pair_weights.tolist() == [1.0, 1.0, 1.0]
    out = beta_dpo(*f1_cast.sums, *state, reduction="none")
    check_vector(out.loss.to(vector_dtype), [0.5219023501, 0.7205116363, 0.6665116363])
    check_vector(out.loss.mean().to(vector_dtype), 0.6363085409)
    check_vector(out.chosen_rewards, [0.54 * x for x in (0.2, 0.1, -0.4)])


def test_beta_dpo_switched_off_is_dpo(f1):
    state = BetaDPO(beta=0.5, alpha=0.0, drop_share=0.0).double()(torch.randn(3).double())
    assert torch.equal(beta_dpo(*f1.sums, *state).loss, dpo(*f1.sums, beta=0.5).loss)


def test_beta_dpo_mean_is_over_the_kept(f1):
    weights = torch.tensor([1.5, 0.0, 1.5])
    beta = torch.tensor(0.3).double().requires_grad_()
    out = beta_dpo(*(x.clone().requires_grad_() for x in f1.sums), beta, weights)
    torch.testing.assert_close(out.loss, dpo(*(x[::2] for x in f1.sums), beta=0.3).loss)
    out.loss.backward()
    assert beta.grad is None
    with pytest.raises(ValueError, match=r"beta_dpo: batch_beta: expected a 0-d tensor, got 0.1"):
        beta_dpo(*f1.sums, 0.1)
    with pytest.raises(ValueError, match=r"beta_dpo: batch_beta: expected a 0-d .* got \[3\]"):
        beta_dpo(*f1.sums, weights)


def _re_po(f1, eta, **options):
    eta = torch.full((3,), eta, dtype=f1.policy_chosen.dtype)
    chosen, rejected, ref_chosen, ref_rejected = f1.sums
    return re_po(chosen, rejected, eta, ref_chosen, ref_rejected, beta=0.5, **options)


def test_re_po(f1_cast, check_vector):
    out = _re_po(f1_cast, 0.9, reduction="none")
    check_vector(out.metrics["posteriors"], [0.9273868379, 0.8954091392, 0.9044108638])
    check_vector(out.loss, [0.5587967622, 0.7132301050, 0.6732391048])
    check_vector(_re_po(f1_cast, 0.9).loss, 0.6484219907)


def test_re_po_of_ipo(f1_cast, check_vector):
    out = _re_po(f1_cast, 0.9, loss=ipo, convention="summed", reduction="none")
    # p = sigmoid(2 d / tau), and the posterior of it at eta = 0.9
    check_vector(out.metrics["posteriors"], [0.9932886726, 0.8578107488, 0.9306827444])
    check_vector(out.loss, [0.0778245429, 0.8561395519, 0.5407421546])
    check_vector(out.loss.mean(), 0.4915687498)


def test_re_po_of_a_certain_annotator_is_the_likelihood(f1):
    torch.testing.assert_close(
        _re_po(f1, 1.0).loss, dpo(*f1.sums, beta=0.5).loss, rtol=0, atol=1e-15
    )
    pair = dict(policy_chosen=f1.policy_chosen, policy_rejected=f1.policy_rejected)
    pair |= dict(chosen_counts=f1.chosen_counts, rejected_counts=f1.rejected_counts)
    got = re_po(**pair, reliability=torch.ones(3), loss=cpo, cpo_alpha=0.0)
    torch.testing.assert_close(got.loss, cpo(**pair, cpo_alpha=0.0).loss)


def test_re_po_of_a_coin_is_self_training(f1):
    p = torch.sigmoid(torch.tensor([0.35, -0.05, 0.05], dtype=torch.float64))
    torch.testing.assert_close(_re_po(f1, 0.5).metrics["posteriors"], p)


def test_re_po_swaps_roles_not_the_margin_of_simpo(f1):
    """SimPO's gamma stays on the side of the label: it drops out of p only up to its logistic."""
    names = ("policy_chosen", "policy_rejected", "chosen_counts", "rejected_counts")
    values = (*f1.sums[:2], *f1.counts)
    straight = dict(zip(names, values, strict=True))
    order = (1, 0, 3, 2)
    swapped = dict(zip(names, (values[i] for i in order), strict=True))
    options = dict(gamma=0.4, beta=2.0, reduction="none")
    gap = simpo(**swapped, **options).loss - simpo(**straight, **options).loss
    out = re_po(**straight, reliability=torch.ones(3), loss=simpo, **options)
    torch.testing.assert_close(out.loss, -torch.nn.functional.logsigmoid(gap))


def test_re_po_gradient_flows_through_p_alone(f1):
    sums = [x.clone().requires_grad_() for x in f1.sums[:2]]
    eta = torch.full((3,), 0.9, dtype=torch.float64, requires_grad=True)
    out = re_po(*sums, eta, *f1.sums[2:], beta=0.5, reduction="sum")
    q = out.metrics["posteriors"]
    out.loss.backward()
    p = torch.sigmoid(torch.tensor([0.35, -0.05, 0.05], dtype=torch.float64))
    torch.testing.assert_close(sums[0].grad, 0.5 * (p - q))
    assert eta.grad is None
    assert not q.requires_grad


def test_re_po_step_of_eta(f1, check_vector, vector_dtype):
    state = RePO().double()
    state.eta.fill_(0.9)  # not that of float32
    annotators = torch.zeros(3, dtype=torch.long)
    chosen, rejected, *ref = f1.sums
    out = re_po(chosen, rejected, state(annotators), *ref, beta=0.5)
    state.update(out.metrics["posteriors"], annotators)
    check_vector(state.eta.to(vector_dtype), [0.9009068947])


def test_uniform_reliability_needs_no_reference():
    zero = torch.zeros(2)
    counts = torch.tensor([3, 4])
    options = dict(chosen_counts=counts, rejected_counts=counts, loss=simpo, gamma=0.0)
    assert re_po(zero, zero, torch.ones(2), **options).loss.item() == pytest.approx(math.log(2))
