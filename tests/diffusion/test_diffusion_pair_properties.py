"""What holds for every diffusion loss over pairs, and how they reduce to one another."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastpo.diffusion import losses

ERRORS = [[0.42, 0.95, 0.38], [0.51, 0.76, 0.44], [0.47, 0.43, 0.36], [0.49, 1.34, 0.37]]
SCORES = [[0.22, 0.19, 0.25], [0.20, 0.21, 0.17]]


@pytest.fixture
def pairs() -> Tensor:
    """[4, 3] in float64: chosen, rejected, reference of chosen, reference of rejected."""
    return torch.tensor(ERRORS, dtype=torch.float64)


class Row(NamedTuple):
    """A loss on four errors [B]; its own arguments filled in."""

    call: Callable[..., losses.LossOutput]
    reference: bool = True
    at_reference: float | None = math.log(2)  # value where the policy is the reference, beta 0.5
    has_gradient_of_value: bool = True


def per_segment(errors: tuple[Tensor, ...]) -> list[Tensor]:
    """[B] as two different columns [B, 2]; exact in half precision."""
    return [torch.stack([error * 0.5, error * 2], 1) for error in errors]


def scores(errors: Tensor) -> list[Tensor]:
    count = errors.shape[0]
    return [torch.tensor(side * 6)[:count] for side in SCORES]


def dense(*errors, **options):
    labels = torch.tensor([[1, -1]]).expand(errors[0].shape[0], 2)
    return losses.dense_dpo(*per_segment(errors), labels, **options)


def inversion(chosen, rejected, *_, **options):
    """With the sign of the derivation, under which fewer errors of the chosen are better."""
    options["published_sign"] = False
    return losses.inversion_dpo(
        *per_segment((chosen, rejected)), torch.tensor([0.9, 0.6]), **options
    )


ROWS = {
    "dpo": Row(losses.dpo),
    "dpo_swap": Row(lambda *e, **o: losses.dpo(*e, swap=True, **o)),
    "hinge": Row(losses.hinge, at_reference=1.0),
    "ipo": Row(losses.ipo, at_reference=1 / (4 * 0.5**2)),
    "smpo": Row(lambda *e, **o: losses.smpo(*e, *scores(e[0]), **o)),
    "seppo": Row(losses.seppo),
    "bide_dpo": Row(
        lambda *e, **o: losses.bide_dpo(*per_segment(e), **o), has_gradient_of_value=False
    ),
    "dense_dpo": Row(dense),
    "pso": Row(lambda *e, **o: losses.pso(*e, prior_weight=0.0, **o)),
    "pso_prior": Row(lambda *e, **o: losses.pso(*e, prior_weight=0.5, **o), at_reference=None),
    "inversion_dpo": Row(inversion, reference=False),
    "contrast": Row(lambda w, l, *_, beta=1.0, **o: losses.contrast(w, l, **o), reference=False),
    "mapo": Row(lambda w, l, *_, **o: losses.mapo(w, l, **o), reference=False),
    "orpo": Row(lambda w, l, *_, **o: losses.orpo(w, l, **o), reference=False),
    "cpo": Row(lambda w, l, *_, **o: losses.cpo(w, l, **o), reference=False),
    "pso_db": Row(lambda w, l, *_, **o: losses.pso_db(w, l, **o), reference=False),
}
REFERENCED = [key for key, row in ROWS.items() if row.reference]


@pytest.fixture(params=ROWS)
def row(request) -> Row:
    return ROWS[request.param]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("key", [key for key, row in ROWS.items() if row.has_gradient_of_value])
def test_gradcheck(key, pairs, reduction):
    row = ROWS[key]
    policy = [x.clone().requires_grad_() for x in pairs[:2]]

    def loss(chosen, rejected):
        return row.call(chosen, rejected, *pairs[2:], beta=0.5, reduction=reduction).loss

    assert torch.autograd.gradcheck(loss, policy)


def test_gradient_goes_to_the_policy_alone(row, pairs):
    errors = [x.clone().requires_grad_() for x in pairs]
    out = row.call(*errors, beta=0.5)
    out.loss.backward()
    assert all(x.grad is not None and x.grad.any() for x in errors[:2])
    assert all(x.grad is None for x in errors[2:])
    assert not out.chosen_rewards.requires_grad
    assert not out.rejected_rewards.requires_grad
    assert out.chosen_rewards.shape == out.rejected_rewards.shape == (3,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(row, pairs, dtype):
    narrow = pairs.to(dtype)
    out, wide = row.call(*narrow, beta=0.5), row.call(*narrow.float(), beta=0.5)
    assert all(x.dtype == torch.float32 for x in out[:3])
    assert all(torch.equal(x, y) for x, y in zip(out[:3], wide[:3], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_errors_are_finite(row, dtype):
    # Errors of 0 and 40 in every combination: with beta 5000 margins of +-1e5 and more.
    values = torch.tensor([0.0, 40.0], dtype=dtype)
    errors = [x.clone().requires_grad_() for x in torch.cartesian_prod(*[values] * 4).unbind(1)]
    out = row.call(*errors, beta=5000.0)
    out.loss.backward()
    grads = [x.grad for x in errors[:2]]
    assert all(torch.isfinite(x).all() for x in (*out[:3], *grads))


@pytest.mark.parametrize(("reduction", "shape"), [("mean", ()), ("sum", ()), ("none", (0,))])
def test_empty_batch(row, reduction, shape):
    errors = [torch.zeros(0, requires_grad=True) for _ in range(4)]
    out = row.call(*errors, beta=0.5, reduction=reduction)
    assert out.loss.shape == shape
    assert out.loss.sum() == 0
    out.loss.sum().backward()
    assert all(x.grad.shape == (0,) for x in errors[:2])


def test_compiles_to_one_graph(row, pairs):
    torch.compiler.reset()  # rows share code: each is a recompilation, whose number is limited
    compiled = torch.compile(row.call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*pairs, beta=0.5).loss, row.call(*pairs, beta=0.5).loss)


@pytest.mark.parametrize("key", [key for key in REFERENCED if ROWS[key].at_reference is not None])
def test_value_at_the_reference(key, pairs):
    row = ROWS[key]
    for dtype in (torch.float32, torch.float64):
        policy = pairs[:2].to(dtype)
        loss = row.call(*policy, *policy, beta=0.5, reduction="none").loss
        assert torch.equal(loss, torch.full_like(loss, row.at_reference))


@pytest.mark.parametrize("key", ["dpo", "dpo_swap", "seppo", "pso"])
@pytest.mark.parametrize("z", [1e3, 1e5])
def test_logistic_heads_are_exact_far_out(key, z):
    # Gains of the chosen alone: the margin is kappa beta a = +-z, and the loss z where it is lost.
    zero, gain = torch.zeros(2), torch.tensor([1.0, -1.0]) * z / 1000
    loss = ROWS[key].call(zero, zero, gain, zero, beta=1000.0, reduction="none").loss
    scale = 0.5 if key.startswith("dpo") else 1.0
    want = [z * scale, 0.0] if key == "dpo_swap" else [0.0, z * scale]
    assert loss.tolist() == want


@pytest.mark.parametrize("key", ["dpo", "hinge", "ipo", "smpo", "seppo", "pso"])
def test_a_shift_of_one_side_in_policy_and_reference_changes_nothing(key, pairs):
    moved = pairs + torch.tensor([[3.0], [1.0], [3.0], [1.0]])
    torch.testing.assert_close(ROWS[key].call(*moved).loss, ROWS[key].call(*pairs).loss)


def swapped(pairs: Tensor) -> Tensor:
    return pairs[[1, 0, 3, 2]]


def test_swapping_a_pair_is_negating_beta(pairs):
    for kappa in (0.5, 1.0):
        options = dict(beta=3.0, kappa=kappa, reduction="none")
        npo = losses.dpo(*pairs, **options, swap=True)
        turned = losses.dpo(*swapped(pairs), **options)
        assert all(torch.equal(x, y) for x, y in zip(npo[:3], turned[:3], strict=True))
        negated = losses.dpo(*pairs, **options, weights=-torch.ones(3))
        torch.testing.assert_close(npo.loss, negated.loss)


def test_kappa_and_beta_are_one_factor(pairs):
    half, one = losses.dpo(*pairs, beta=3.0), losses.dpo(*pairs, beta=1.5, kappa=1.0)
    assert all(torch.equal(x, y) for x, y in zip(half[:3], one[:3], strict=True))


DPO_AGAIN = {
    "smpo": lambda p: losses.smpo(
        *p, torch.ones(3), torch.zeros(3), beta=2.0, kappa=1.0, gamma=1.0, highest=1e-3, lowest=0.0
    ),
    "dense_dpo": lambda p: losses.dense_dpo(
        *(x[:, None] for x in p), torch.ones(3, 1, dtype=torch.int64), beta=2.0
    ),
    "pso": lambda p: losses.pso(*p, beta=2.0, rejected_weight=1.0),
    "bide_dpo": lambda p: losses.bide_dpo(*(x[:, None] for x in p), beta=2.0, kappa=1.0),
    "weights": lambda p: losses.dpo(*p, beta=1.0, weights=torch.full((3,), 4.0)),
}


@pytest.mark.parametrize("key", DPO_AGAIN)
def test_special_case_is_dpo(key, pairs):
    out, want = DPO_AGAIN[key](pairs), losses.dpo(*pairs, beta=2.0, kappa=1.0)
    torch.testing.assert_close(out.loss, want.loss)
    if key != "weights":  # rewards leave the weights out
        torch.testing.assert_close(out[1:3], want[1:3])


def test_cpo_is_dpo_over_errors_of_zero_plus_fine_tuning(pairs):
    zero = torch.zeros(3, dtype=torch.float64)
    want = losses.dpo(*pairs[:2], zero, zero, beta=2.0, kappa=1.0).loss + 0.3 * pairs[0].mean()
    torch.testing.assert_close(losses.cpo(*pairs[:2], beta=2.0, sft_weight=0.3).loss, want)


@pytest.mark.parametrize("loss", [losses.mapo, losses.orpo])
def test_without_beta_it_is_fine_tuning(loss, pairs):
    torch.testing.assert_close(loss(*pairs[:2], beta=0.0).loss, pairs[0].mean())


def test_inversion_dpo_is_dpo_whose_reference_has_no_error(pairs):
    weights, zero = 1 / (2 * torch.tensor([0.9, 0.6, 0.8])), torch.zeros(1, dtype=torch.float64)
    errors = [(weights * x).mean()[None] for x in pairs[:2]]
    alphas_cumprod = torch.tensor([0.9, 0.6, 0.8])
    options = {"beta": 3.0, "published_sign": False}
    out = losses.inversion_dpo(pairs[:1], pairs[1:2], alphas_cumprod, **options)
    want = losses.dpo(*errors, zero, zero, beta=3.0)
    torch.testing.assert_close(out[:3], want[:3])
    per_pair = losses.inversion_dpo(pairs[:1], pairs[1:2], alphas_cumprod[None], **options)
    assert torch.equal(per_pair.loss, out.loss)


def test_published_sign_of_inversion_dpo_is_a_swap(pairs):
    chosen, rejected, alphas_cumprod = pairs[:1], pairs[1:2], torch.tensor([0.9, 0.6, 0.8])
    published = losses.inversion_dpo(chosen, rejected, alphas_cumprod)
    derived = losses.inversion_dpo(rejected, chosen, alphas_cumprod, published_sign=False)
    assert torch.equal(published.loss, derived.loss)


def test_contrast_is_the_unpaired_form_of_both_sides(pairs):
    errors, desirable = pairs[:2].flatten(), torch.tensor([True] * 3 + [False] * 3)
    out = losses.contrast_unpaired(errors, desirable)
    torch.testing.assert_close(2 * out.loss, losses.contrast(*pairs[:2]).loss)
    assert torch.equal(out.rewards, -errors)


def test_smpo_of_a_tie_is_log_2_without_gradient(pairs):
    policy = pairs[:2].clone().requires_grad_()
    tie = torch.full((3,), 0.2)
    out = losses.smpo(*policy, *pairs[2:], tie, tie)
    assert out.loss.item() == math.log(2)
    out.loss.backward()
    assert not policy.grad.any()


def test_weights_of_smpo_have_no_gradient():
    assert not losses.smpo_weights(*torch.tensor(SCORES).requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("call", "scales"),
    [
        (losses.contrast, (1.0, 1.0)),
        (lambda *e: losses.orpo(*e, beta=3.0), (3.0, 3.0)),
        (lambda *e: losses.orpo(*e, beta=3.0, published_sign=True), (3.0, 3.0)),
        (lambda *e: losses.cpo(*e, beta=3.0), (3.0, 3.0)),
        (lambda *e: losses.pso_db(*e, beta=3.0, rejected_weight=0.3), (3.0, 0.9)),
    ],
    ids=["contrast", "orpo", "orpo_published_sign", "cpo", "pso_db"],
)
def test_rewards_without_a_reference_are_negative_errors(call, scales, pairs):
    out = call(*pairs[:2])
    torch.testing.assert_close(out.chosen_rewards, -scales[0] * pairs[0])
    torch.testing.assert_close(out.rejected_rewards, -scales[1] * pairs[1])


def test_smpo_turns_pairs_whose_rejected_scores_higher(pairs):
    scores = torch.tensor(SCORES)
    out = losses.smpo(*pairs, *scores, reduction="none").loss
    turned = losses.smpo(*swapped(pairs), *scores.flip(0), reduction="none").loss
    torch.testing.assert_close(out, turned)
    assert (losses.smpo_weights(*scores) < 0).tolist() == [False, True, False]


def test_seppo_counts_the_generated_sample_by_the_reference_on_the_anchor():
    # The reference is worse, equal and better on the anchor: loser, loser, winner.
    generated = torch.full((3,), 0.3, requires_grad=True)
    anchors, refs = torch.full((3,), 0.2), torch.tensor([0.26, 0.2, 0.15])
    out = losses.seppo(anchors, generated, refs, torch.full((3,), 0.3), beta=2.0)
    out.loss.backward()
    assert generated.grad.sign().tolist() == [-1, -1, 1]


def test_seppo_on_winners_anchored_by_a_worse_reference_is_dpo(pairs):
    worse = pairs.clone()
    worse[2] = worse[0] + 0.1
    want = losses.dpo(*worse, beta=2.0, kappa=1.0)
    torch.testing.assert_close(losses.seppo(*worse, beta=2.0)[:3], want[:3])


@pytest.fixture
def segments() -> Tensor:
    """[4, B, F] = [4, 2, 3] in float64."""
    return torch.rand(4, 2, 3, dtype=torch.float64)


def test_dense_dpo_of_equal_labels_is_dpo_on_the_clip(segments):
    clip = losses.dpo(*segments.mean(-1), beta=20.0, kappa=1.0)
    ones = torch.ones(2, 3, dtype=torch.int8)
    for norm, factor in (("all", 1), ("valid", 1), ("none", 3)):
        out = losses.dense_dpo(*segments, ones, beta=20.0 / factor, norm=norm)
        torch.testing.assert_close(out[:3], clip[:3])
    turned = losses.dense_dpo(*segments, -ones, beta=20.0)
    torch.testing.assert_close(turned.loss, losses.dpo(*swapped(segments.mean(-1)), 20.0, 1.0).loss)


def test_dense_dpo_leaves_ties_out(segments):
    labels = torch.tensor([[1, 0, -1], [0, 0, 0]])
    valid = losses.dense_dpo(*segments, labels, norm="valid", reduction="none")
    kept = losses.dense_dpo(*segments[:, :1, ::2], labels[:1, ::2], reduction="none")
    torch.testing.assert_close(valid.loss[:1], kept.loss)
    assert valid.loss[1].item() == math.log(2)
    all_of_them = losses.dense_dpo(*segments, labels, beta=750.0, reduction="none")
    torch.testing.assert_close(all_of_them.loss, valid.loss)


def test_dense_dpo_errors_of_ties_are_harmless(segments):
    labels = torch.tensor([[1, 0, -1], [0, 1, 1]])
    spoiled = segments.masked_fill(labels == 0, math.nan).requires_grad_()
    out = losses.dense_dpo(*spoiled, labels)
    assert torch.equal(out.loss, losses.dense_dpo(*segments, labels).loss)
    out.loss.backward()
    assert spoiled.grad.isfinite().all()


def test_dense_dpo_weights_scale_the_margin(segments):
    labels, weights = torch.tensor([[1, 0, -1], [0, 1, 1]]), torch.tensor([2.0, 2.0])
    weighted = losses.dense_dpo(*segments, labels, beta=10.0, weights=weights)
    torch.testing.assert_close(weighted.loss, losses.dense_dpo(*segments, labels, beta=20.0).loss)


def test_adaptive_balance_is_a_mean_of_equal_losses_and_uniform_at_zero():
    assert losses.adaptive_balance([torch.tensor(0.4)] * 3).item() == pytest.approx(0.4)
    leaves = [torch.tensor(0.0, requires_grad=True) for _ in range(4)]
    out = losses.adaptive_balance(leaves)
    out.backward()
    assert out.item() == 0
    assert [x.grad.item() for x in leaves] == [0.25] * 4


def test_adaptive_balance_of_half_losses_is_computed_in_float32():
    halves = [torch.tensor(x).bfloat16() for x in (0.9, 0.3)]
    out = losses.adaptive_balance(halves)
    assert out.dtype == torch.float32
    assert out == losses.adaptive_balance([x.float() for x in halves])


def test_adaptive_balance_has_no_gradient_through_its_shares():
    x = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    losses.adaptive_balance([3 * x, x]).backward()
    assert x.grad.item() == pytest.approx(0.75 * 3 + 0.25)


def test_bide_dpo_balances_the_losses_of_its_pairs(segments):
    policy = segments[:2].clone().requires_grad_()
    errors = *policy, *segments[2:]
    terms = [losses.dpo(*(x[:, k] for x in errors), beta=20.0).loss for k in range(3)]
    want = losses.adaptive_balance(terms)
    out = losses.bide_dpo(*errors, beta=20.0)
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, policy), torch.autograd.grad(want, policy)
    )
    shares = torch.stack(terms).detach() / sum(terms).detach()
    torch.testing.assert_close(out.metrics["shares"], shares)


def test_pso_pushes_the_rejected_by_nu_and_keeps_them_fitted(pairs):
    def gradient(**options):
        policy = pairs[:2].clone().requires_grad_()
        losses.pso(*policy, *pairs[2:], beta=2.0, reduction="sum", **options).loss.backward()
        return policy.grad

    chosen, rejected = gradient(rejected_weight=0.3)
    torch.testing.assert_close(rejected, -0.3 * chosen)
    fitted = gradient(rejected_weight=0.3, prior_weight=0.5)
    torch.testing.assert_close(fitted, torch.stack([chosen, rejected + 0.5]))


@pytest.mark.parametrize("key", ["dpo", "hinge", "ipo", "seppo", "pso"])
def test_weights_scale_the_margin_and_get_no_gradient(key, pairs):
    loss = getattr(losses, key)
    weights = torch.full((3,), 3.0, dtype=torch.float64, requires_grad=True)
    policy = pairs[:2].clone().requires_grad_()
    out = loss(*policy, *pairs[2:], beta=0.5, weights=weights)
    out.loss.backward()
    assert weights.grad is None
    torch.testing.assert_close(out.loss, loss(*(3 * pairs), beta=0.5).loss)


@pytest.mark.parametrize("beta", [-0.1, math.inf, math.nan])
@pytest.mark.parametrize("key", [key for key in ROWS if key != "contrast"])
def test_beta_range(key, pairs, beta):
    with pytest.raises(ValueError, match=r"diffusion.losses.\w+: beta: expected a .*finite number"):
        ROWS[key].call(*pairs, beta=beta)


def test_reduction_name(row, pairs):
    with pytest.raises(ValueError, match=r"reduction: expected one of mean, sum, none, got 'all'"):
        row.call(*pairs, beta=0.5, reduction="all")


ZERO = torch.zeros(3)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda p: losses.dpo(p[0], p[1, :2], *p[2:]), r"dpo: rejected_errors: .* got \[2\]"),
        (lambda p: losses.dpo(p, *p[1:]), r"dpo: chosen_errors: .* got \[4, 3\].*noise_errors"),
        (lambda p: losses.dpo(p[0], p[1].to("meta"), *p[2:]), "rejected_errors: expected device"),
        (lambda p: losses.dpo(p[0], p[1] > 0, *p[2:]), "rejected_errors: expected real numbers"),
        (lambda p: losses.dpo(*p, kappa=0), "dpo: kappa: expected a positive finite number"),
        (lambda p: losses.dpo(*p, weights=p), r"dpo: weights: expected \[3\] on cpu, got \[4, 3\]"),
        (lambda p: losses.pso(*p, rejected_weight=-1), "pso: rejected_weight: .* >= 0"),
        (lambda p: losses.pso(*p, prior_weight=-1), "pso: prior_weight: .* >= 0"),
        (lambda p: losses.pso_db(*p[:2], prior_weight=-1), "pso_db: prior_weight: .* >= 0"),
        (lambda p: losses.smpo(*p, ZERO, ZERO, gamma=0), "smpo_weights: gamma: expected a pos"),
        (lambda p: losses.smpo(*p, ZERO, ZERO, lowest=1, highest=1), "lowest, highest: expected"),
        (lambda p: losses.smpo(*p, ZERO, ZERO[:2]), "smpo_weights: rejected_scores: .* shape"),
        (lambda p: losses.smpo(*p, ZERO[:2], ZERO[:2]), r"smpo: chosen_scores: .* shape \[3\]"),
        (lambda p: losses.smpo_weights(p, p), r"chosen_scores: expected \[B\], .* one score per s"),
        (lambda p: losses.mapo(*p[:2], snr=0), "mapo: snr: expected a positive"),
        (lambda p: losses.mapo(*p[:2], timesteps=0), "mapo: timesteps: expected a positive"),
        (lambda p: losses.cpo(*p[:2], sft_weight=-1), "cpo: sft_weight: .* >= 0"),
        (lambda p: losses.contrast_unpaired(p[0], ZERO), "desirable: expected torch.bool"),
        (lambda p: losses.bide_dpo(*p), r"bide_dpo: chosen_errors: expected \[B, K\], got \[3\]"),
        (lambda p: losses.dense_dpo(*p, p[0]), r"dense_dpo: chosen_errors: expected \[B, F\]"),
        (
            lambda p: losses.dense_dpo(*[p] * 4, p.T),
            r"dense_dpo: labels: expected shape \[4, 3\] .* got \[3, 4\]",
        ),
        (
            lambda p: losses.dense_dpo(*[p] * 4, p, norm="F"),
            "norm: expected one of all, valid, none, got 'F'",
        ),
        (
            lambda p: losses.inversion_dpo(p, p, p[0, :2]),
            r"inversion_dpo: alphas_cumprod: expected \[3\] or \[4, 3\] on cpu, got \[2\]",
        ),
        (lambda p: losses.adaptive_balance([]), "adaptive_balance: losses: expected 0-d"),
        (lambda p: losses.adaptive_balance([p[0]]), r"adaptive_balance: losses: .* \[\[3\]\]"),
    ],
)
def test_bad_input(call, match, pairs):
    with pytest.raises(ValueError, match=match):
        call(pairs)
