"""Published vectors and properties of the losses that look into the tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import fastpo
from fastpo import losses
from fastpo.losses import dpo, rrpo, sparse_po, tdpo1, tdpo2, tgdpo
from fastpo.weights import (
    ld_dpo_weights,
    ma_po_weights,
    phrase_masks,
    tgdpo_weights,
    wpo_weights,
)

LOGITS = (
    [[2, 0.5, -1, 0], [0.3, 1.2, 0.1, -0.4], [1, 1, 0, -2]],
    [[0, 1.5, 0.2, -0.3], [1.1, -0.6, 0.9, 0.4]],
)
REF_LOGITS = (
    [[1.5, 0.7, -0.8, 0.2], [0.1, 1, 0.4, -0.5], [0.8, 1.3, 0.1, -1.5]],
    [[0.2, 1.1, 0.1, -0.2], [0.9, -0.3, 1.2, 0.2]],
)
LABELS = ([0, 1, 1], [1, 2])
# Per token: log-prob, the reference's, KL(ref || policy), KL(policy || ref), log sum p^2.
PUBLISHED = (
    [
        [-0.3423495824, -0.6633770456, -0.8828028227],
        [-0.6000004393, -0.7786418252, -0.6772895779],
        [0.0581811666, 0.0209377789, 0.0270342381],
        [0.0547208029, 0.0191324911, 0.0276117426],
        [-0.6164972439, -1.0515007486, -1.0058218173],
    ],
    [
        [-0.5073962550, -1.1154902439],
        [-0.7163659730, -0.8466524330],
        [0.0306864148, 0.0311063517],
        [0.0293826556, 0.0307189454],
        [-0.8738274925, -1.1630022649],
    ],
)


class Side(NamedTuple):
    """Values of one response, padded to [1, 4]; NaN outside the mask."""

    policy: Tensor
    ref: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor
    log_sum_sq_probs: Tensor
    mask: Tensor

    def row(self, *values: float) -> Tensor:
        """Weights of the tokens, padded."""
        return torch.tensor([[*values, *[0.0] * (4 - len(values))]], dtype=self.policy.dtype)

    def sums(self, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return tuple(
            fastpo.sequence_sums(values, self.mask, weights=weights) for values in self[:2]
        )

    def log_ratio(self, weights: Tensor | None = None) -> Tensor:
        return fastpo.sequence_log_ratios(self.policy, self.ref, self.mask, weights=weights)

    def kl(self, weights: Tensor | None = None) -> Tensor:
        return fastpo.sequence_sums(self.forward_kl, self.mask, weights=weights)


def _plain(logits, ref, labels):
    log_p, log_q = logits.log_softmax(1), ref.log_softmax(1)
    return (
        log_p.gather(1, labels[:, None])[:, 0],
        log_q.gather(1, labels[:, None])[:, 0],
        (log_q.exp() * (log_q - log_p)).sum(1),
        (log_p.exp() * (log_p - log_q)).sum(1),
        (2 * log_p).logsumexp(1),
    )


def _kernels(logits, ref, labels):
    """Hidden states that are logits, and a head that is the identity."""
    head = torch.eye(4, dtype=logits.dtype)
    stats = fastpo.linear_token_stats(
        logits, head, labels, outputs=("logprobs", "log_sum_sq_probs")
    )
    kls = (
        fastpo.linear_divergence(logits, head, ref, head, kind=kind)
        for kind in ("forward_kl", "reverse_kl")
    )
    return stats.logprobs, fastpo.linear_logprobs(ref, head, labels), *kls, stats.log_sum_sq_probs


@pytest.fixture(params=[_plain, _kernels])
def f2(request, vector_dtype) -> tuple[Side, Side]:
    sides = []
    for logits, ref, labels in zip(LOGITS, REF_LOGITS, LABELS, strict=True):
        logits, ref = (torch.tensor(x, dtype=vector_dtype) for x in (logits, ref))
        values = request.param(logits, ref, torch.tensor(labels))
        padded = [torch.full((1, 4), math.nan, dtype=vector_dtype) for _ in values]
        for row, value in zip(padded, values, strict=True):
            row[0, : len(labels)] = value
        sides.append(Side(*padded, ~padded[0].isnan()))
    return tuple(sides)


def _pair_sums(chosen, rejected, *weights):
    weights = weights or (None, None)
    policy_chosen, ref_chosen = chosen.sums(weights[0])
    policy_rejected, ref_rejected = rejected.sums(weights[1])
    return policy_chosen, policy_rejected, ref_chosen, ref_rejected


def test_the_fixture_is_the_published_one(f2, check_vector):
    for side, published in zip(f2, PUBLISHED, strict=True):
        for values, row in zip(side[:5], published, strict=True):
            check_vector(values[side.mask], row)
    check_vector(f2[0].log_ratio() - f2[1].log_ratio(), [0.2272704847])


def test_tdpo(f2, check_vector):
    sums = *_pair_sums(*f2), f2[0].kl(), f2[1].kl()
    check_vector(tdpo1(*sums).loss, 0.6796578618)
    check_vector(tdpo2(*sums).loss, 0.6807524259)


def test_sparse_po(f2, check_vector):
    chosen, rejected = f2
    weights = chosen.row(1, 0, 0.5), rejected.row(0.2, 1)
    u = [side.log_ratio(w) for side, w in zip(f2, weights, strict=True)]
    kl = [side.kl(w) for side, w in zip(f2, weights, strict=True)]
    check_vector(sparse_po(*u, *kl).loss, 0.6725442559)


def test_rrpo(f2, check_vector):
    chosen, rejected = f2
    ids = chosen.row(0, 1, 2).long(), rejected.row(1, 0).long()
    masks = [phrase_masks(x, side.mask) for x, side in zip(ids, f2, strict=True)]
    phrases = [side._replace(mask=mask) for side, mask in zip(f2, masks, strict=True)]
    out = rrpo(*_pair_sums(*phrases), chosen.kl())
    check_vector(out.loss, 0.7092815318)


def test_wpo(f2, check_vector):
    weights = [wpo_weights(side.policy, side.log_sum_sq_probs, side.mask) for side in f2]
    check_vector(torch.cat(weights), [1.2992191797, 1.2299476767])
    check_vector(losses.wpo(*_pair_sums(*f2), *weights).loss, 1.0895740986)


def _guided(f1_tokens):
    """Sums of F1's first pair in float64 and its token rewards."""
    chosen, rejected = (type(side)(*(x[:1] for x in side)) for side in f1_tokens)
    q = [torch.zeros_like(side.mask, dtype=torch.float64) for side in (chosen, rejected)]
    q[0][0, :3] = torch.tensor([0.2, -0.1, 0.3], dtype=torch.float64)
    q[1][0, :2] = torch.tensor([-0.4, 0.1], dtype=torch.float64)
    return chosen, rejected, q


def test_tgdpo(f1_tokens, f1, vector_dtype, check_vector):
    chosen, rejected, q = _guided(f1_tokens)
    guided = [
        fastpo.sequence_log_ratios(side.policy, side.ref, side.mask, weights=w)
        for side, w in zip((chosen, rejected), q, strict=True)
    ]
    sums = [x[:1].to(vector_dtype) for x in f1.sums]
    out = tgdpo(*sums, *(g.to(vector_dtype) for g in guided))
    check_vector(out.loss, 0.6588319344)

    weights = tgdpo_weights(*q)
    weighted = [
        fastpo.sequence_sums(values, side.mask, weights=w).to(vector_dtype)
        for values_of in ("policy", "ref")
        for side, w in zip((chosen, rejected), weights, strict=True)
        for values in [getattr(side, values_of)]
    ]
    check_vector(dpo(*weighted).loss, 0.6588319344)


def test_tgdpo_weights_are_not_clipped():
    weights = tgdpo_weights(torch.tensor([[-40.0]]), torch.tensor([[40.0]]))
    assert [w.item() for w in weights] == [-1.0, -1.0]


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_ld_dpo(alpha, f1_tokens, f1, vector_dtype, check_vector):
    chosen, rejected = f1_tokens
    weights = ld_dpo_weights(chosen.mask, rejected.mask, alpha)

    def sums(name, weights=(None, None)):
        return [
            fastpo.sequence_sums(getattr(side, name), side.mask, weights=w).to(vector_dtype)
            for side, w in zip(f1_tokens, weights, strict=True)
        ]

    both = dpo(*sums("policy", weights), *sums("ref", weights), beta=0.5, reduction="none").loss
    policy = dpo(*sums("policy", weights), *sums("ref"), beta=0.5, reduction="none").loss
    if alpha == 1:
        check_vector(both, dpo(*f1.sums, beta=0.5, reduction="none").loss.tolist())
        return
    check_vector(both, [0.5231232641, 0.7313501408, 0.6807253035])
    check_vector(both.mean(), 0.6450662362)
    check_vector(policy, [0.4464182101, 0.6563501408, 1.0054924815])
    check_vector(policy.mean(), 0.7027536108)


def test_sampo_with_the_first_tokens(f1_tokens, vector_dtype, check_vector):
    chosen, rejected = f1_tokens
    # Weights of LD-DPO at alpha = 0 keep the first m tokens.
    keep = [w.bool() for w in ld_dpo_weights(chosen.mask, rejected.mask, alpha=0.0)]
    sums = [
        fastpo.sequence_sums(getattr(side, name), mask).to(vector_dtype)
        for name in ("policy", "ref")
        for side, mask in zip(f1_tokens, keep, strict=True)
    ]
    loss = dpo(*sums, beta=0.5, reduction="none").loss
    check_vector(loss, [0.5130152524, 0.7443966601, 0.6931471806])
    check_vector(loss.mean(), 0.6501863643)


# Special cases and gradients.


@pytest.fixture
def kls():
    return torch.tensor([0.3, 0.1, 0.2]).double(), torch.tensor([0.2, 0.4, 0.05]).double()


def test_special_cases_are_dpo(f1, kls):
    want = dpo(*f1.sums).loss
    assert torch.equal(tdpo2(*f1.sums, *kls, alpha=0.0).loss, want)
    assert torch.equal(rrpo(*f1.sums, kls[0], alpha=0.0).loss, want)
    assert torch.equal(tgdpo(*f1.sums, *kls, alpha=0.0).loss, want)
    zero = torch.zeros_like(kls[0])
    assert torch.equal(tdpo1(*f1.sums, zero, zero).loss, want)


def test_at_the_reference_they_are_log_2(f1):
    sums, zero = f1.sums[:2] * 2, torch.zeros(3).double()
    for out in (tdpo1(*sums, zero, zero), tdpo2(*sums, zero, zero), rrpo(*sums, zero)):
        assert out.loss.item() == pytest.approx(math.log(2))


def test_a_pair_without_phrases_is_log_2_and_its_kl(kls):
    zero = torch.zeros(3).double()
    out = rrpo(zero, zero, zero, zero, kls[0], alpha=0.1, reduction="none")
    torch.testing.assert_close(out.loss, math.log(2) + 0.1 * kls[0])


def test_sparse_po_with_ones_is_tdpo1(f1, kls):
    ratios = f1.policy_chosen - f1.ref_chosen, f1.policy_rejected - f1.ref_rejected
    out, want = sparse_po(*ratios, *kls), tdpo1(*f1.sums, *kls)
    for got, expected in zip(out[:3], want[:3], strict=True):
        assert torch.equal(got, expected)


def test_rewards_of_tdpo_have_the_kl(f1, kls):
    for loss in (tdpo1, tdpo2):
        out = loss(*f1.sums, *kls, beta=0.5)
        log_ratio = f1.policy_chosen - f1.ref_chosen
        torch.testing.assert_close(out.chosen_rewards, 0.5 * (log_ratio + kls[0]))


@pytest.mark.parametrize("loss", [tdpo1, tdpo2, tgdpo])
def test_gradients_of_the_second_sums(loss, f1, kls):
    kls = [x.requires_grad_() for x in kls]
    loss(*f1.sums, *kls).loss.backward()
    assert (kls[1].grad != 0).all()
    # TDPO's second form keeps the chosen KL constant.
    assert (kls[0].grad is None) == (loss is tdpo2)
    if loss is not tdpo2:
        assert torch.autograd.gradcheck(lambda *x: loss(*f1.sums, *x).loss, kls)


def test_rrpo_has_a_gradient_to_the_kl_of_all_chosen_tokens(f1, kls):
    kl = kls[0].requires_grad_()
    rrpo(*f1.sums, kl, alpha=0.03).loss.backward()
    torch.testing.assert_close(kl.grad, torch.full_like(kl, 0.03 / 3))


def test_sparse_po_gradients_to_the_weights_and_penalties():
    """dL/dm = g u + l1 and dL/dn = g KL + l1, g the gradient by the sums."""
    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.randn(2, 3, generator=generator, dtype=torch.float64)

    policy, ref, kl = draw(), draw(), draw().abs()
    m, n = (draw().abs().requires_grad_() for _ in range(2))
    mask = torch.tensor([[True, True, False], [True, True, True]])

    def loss(m, n):
        u = fastpo.sequence_log_ratios(policy, ref, mask, weights=m)
        d = fastpo.sequence_sums(kl, mask, weights=n)
        totals = [
            fastpo.sequence_sums(x, mask)[:1] + fastpo.sequence_sums(x, mask)[1:] for x in (m, n)
        ]
        return sparse_po(u[:1], u[1:], d[:1], d[1:], *totals, l1=0.01, kl_l1=0.02, beta=0.5).loss

    assert torch.autograd.gradcheck(loss, (m, n))
    u, d = (policy - ref) * m * mask, kl * n * mask
    g = 0.5 * (torch.sigmoid(0.5 * (u[0] - u[1] + d[0] - d[1]).sum()) - 1)
    sign = torch.tensor([[1.0], [-1.0]])
    grads = torch.autograd.grad(loss(m, n), (m, n))
    torch.testing.assert_close(grads[0], mask * (g.detach() * sign * (policy - ref) + 0.01))
    torch.testing.assert_close(grads[1], mask * (g.detach() * sign * kl + 0.02))


def test_sparse_po_options(kls):
    with pytest.raises(ValueError, match=r"sparse_po: mask_l1: expected sums .* got None.*l1=0"):
        sparse_po(*kls, *kls, l1=0.1)
    with pytest.raises(ValueError, match=r"sparse_po: kl_l1: expected a finite number >= 0"):
        sparse_po(*kls, *kls, kl_l1=-1.0)
    with pytest.raises(ValueError, match=r"tdpo2: alpha: expected a finite number >= 0"):
        tdpo2(*kls, *kls, *kls, alpha=-1.0)
    with pytest.raises(ValueError, match=r"tdpo1: kl_rejected: expected shape \[3\]"):
        tdpo1(*kls, *kls, kls[0], kls[0][:2])


def test_ma_po_in_sparse_po_is_blind_to_scale_and_shift():
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    activations = torch.tensor([[[1.0, 3.0], [0.0, 2.0], [5.0, 5.0], [9.0, 9.0]], [[1.0, 1.0]] * 4])
    activations[0, 3] = torch.nan
    weights = ma_po_weights(activations, mask)
    assert weights.tolist() == [[0.25, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(ma_po_weights(3 * activations + 7, mask), weights)


def test_packed_tokens_give_the_sums_of_padded_ones(f2):
    """What the masks select, packed: the same losses."""
    chosen, rejected = f2
    weights = ld_dpo_weights(chosen.mask, rejected.mask)
    for side, w in zip(f2, weights, strict=True):
        cu_seqlens = torch.tensor([0, int(side.mask.sum())])
        packed = fastpo.sequence_log_ratios(
            side.policy[side.mask],
            side.ref[side.mask],
            cu_seqlens=cu_seqlens,
            weights=w[side.mask],
        )
        assert torch.equal(packed, side.log_ratio(w))
        surprise = side.policy[side.mask] - side.log_sum_sq_probs[side.mask]
        wpo = fastpo.sequence_means(surprise, cu_seqlens=cu_seqlens).exp()
        torch.testing.assert_close(wpo, wpo_weights(side.policy, side.log_sum_sq_probs, side.mask))
