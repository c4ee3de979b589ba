"""Published vectors and properties of the soft-label, exploration and POWER losses."""

from __future__ import annotations

import math

import pytest
import torch
from online_pairs import Online
from torch.nn.functional import logsigmoid

from fastpo import losses
from fastpo.data.search import visit_labels


@pytest.fixture
def pairs(vector_dtype) -> Online:
    return Online(vector_dtype)


@pytest.fixture
def exact() -> Online:
    return Online(torch.float64)


# name: loss, further arguments of the fixture, options, per pair, mean
VECTORS = {
    "dpo": (losses.dpo, lambda f: {}, {}, None, 0.682676853932),
    "soft_label_ce": (
        losses.soft_label_ce,
        lambda f: {"label": f(0.9, 0.55)},
        {},
        [0.63595704779, 0.699396660074],
        0.667676853932,
    ),
    "osp": (
        losses.osp,
        lambda f: {"label": f(0.9, 0.55)},
        {},
        [0.63595704779, 0.699396660074],
        0.667676853932,
    ),
    "dno": (
        losses.dno,
        lambda f: {"chosen_win_rates": f(0.8, 0.6), "rejected_win_rates": f(0.3, 0.65)},
        {},
        [0.677588148109, 0.693146920425],
        0.685367534267,
    ),
    "selm": (
        losses.selm,
        lambda f: f.extra,
        {},
        [0.685670305296, 0.698162680508],
        0.691916492902,
    ),
    "xpo": (
        losses.xpo,
        lambda f: {"extra": f.extra["extra"]},
        {},
        [0.62075704779, 0.744216660074],
        0.682486853932,
    ),
    "vpo_online": (
        losses.vpo,
        lambda f: f.extra,
        {"setting": "online"},
        [0.62045704779, 0.744696660074],
        0.682576853932,
    ),
    "vpo_offline": (
        losses.vpo,
        lambda f: {},
        {},
        [0.61995704779, 0.744896660074],
        0.682426853932,
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_published_vector(name, pairs):
    loss, further, options, per_pair, mean = VECTORS[name]
    arguments = {**pairs.sums, **further(pairs), **options}
    if per_pair is None:
        pairs.check(loss(**arguments).loss, mean)
    else:
        pairs.check_pairs(loss, per_pair, mean, **arguments)


def test_dno_labels(exact):
    # The labels themselves, read off the gradient: beta (sigmoid(beta d) - q).
    sums = exact.sums
    policy = sums["policy_chosen"].requires_grad_()
    out = losses.dno(**sums, chosen_win_rates=exact(0.8, 0.6), rejected_win_rates=exact(0.3, 0.65))
    (grad,) = torch.autograd.grad(2 * out.loss, policy)
    label = torch.sigmoid(0.1 * exact(1.5, -1.0)) - grad / 0.1
    exact.check(label, [0.622459331202, 0.487502603516])


def test_vpo_on_the_pairwise_fixture(f1_cast, check_vector):
    # The mean alone is published there.
    check_vector(losses.vpo(*f1_cast.sums, beta=0.5, alpha=0.1).loss, 0.6417671505)


def test_ipo_sum_form_anchor(pairs):
    arguments = {**pairs.sums, "beta": 0.1, "convention": "summed"}
    pairs.check(losses.ipo(**arguments).loss, 24.125)


def test_label_1_is_dpo_and_any_label_is_conservative_dpo(exact):
    sums = exact.sums
    want = losses.dpo(**sums, reduction="none").loss
    ones = torch.ones(2, dtype=torch.float64)
    for loss in (losses.soft_label_ce, losses.osp):
        assert torch.equal(loss(**sums, label=ones, reduction="none").loss, want)
        smoothed = losses.dpo(**sums, label_smoothing=0.3).loss
        torch.testing.assert_close(loss(**sums, label=0.7 * ones).loss, smoothed)


def test_swapping_the_pair_and_its_label_changes_nothing(exact):
    sums = exact.sums
    swapped = {
        name: sums[
            name.replace("chosen", "?").replace("rejected", "chosen").replace("?", "rejected")
        ]
        for name in sums
    }
    label = exact(0.9, 0.55)
    want = losses.soft_label_ce(**sums, label=label, reduction="none").loss
    got = losses.soft_label_ce(**swapped, label=1 - label, reduction="none").loss
    torch.testing.assert_close(got, want)


def test_soft_label_loss_is_affine_in_the_label_with_its_minimum_at_the_logit(exact):
    sums = exact.sums
    low, high = exact(0.2, 0.3), exact(0.8, 0.9)
    ends = [losses.soft_label_ce(**sums, label=q, reduction="none").loss for q in (low, high)]
    middle = losses.soft_label_ce(**sums, label=(low + high) / 2, reduction="none").loss
    torch.testing.assert_close(middle, (ends[0] + ends[1]) / 2)
    for q in (0.5, 0.8):
        at = torch.tensor([math.log(q / (1 - q)) / 0.1], dtype=torch.float64, requires_grad=True)
        zero = torch.zeros(1, dtype=torch.float64)
        out = losses.soft_label_ce(at, zero, zero, zero, label=torch.full_like(zero, q))
        assert abs(torch.autograd.grad(out.loss, at)[0]) < 1e-16


def test_dno_with_equal_win_rates_pulls_to_the_reference_and_far_ones_are_the_practical_form(exact):
    sums = exact.sums
    half = exact(0.5, 0.5)
    rates = {"chosen_win_rates": half, "rejected_win_rates": half}
    want = losses.soft_label_ce(**sums, label=half).loss
    assert torch.equal(losses.dno(**sums, **rates).loss, want)
    far = {"chosen_win_rates": half + 100, "rejected_win_rates": half}
    torch.testing.assert_close(losses.dno(**sums, **far).loss, losses.dpo(**sums).loss)


@pytest.mark.parametrize("label", [0.75, 0.5, 1.0])
def test_mcts_dpo_with_a_label_is_conservative_dpo(label, exact):
    arguments = {**exact.sums, **exact.counts}
    got = losses.mcts_dpo(**arguments, label=exact(label, label), reduction="none").loss
    smoothing = 1 - label
    want = -(1 - smoothing) * logsigmoid(exact(0.15, -0.1))
    want = want - smoothing * logsigmoid(-exact(0.15, -0.1))
    torch.testing.assert_close(got, want)
    if label == 1:
        assert torch.equal(losses.mcts_dpo(**arguments).loss, losses.dpo(**exact.sums).loss)


def test_mcts_dpo_vector_from_visit_counts(pairs):
    # Visits 6 against 2 leave a smoothing of 1/4; none of the rejected one is plain DPO.
    label = visit_labels(torch.tensor([6, 3]), torch.tensor([2, 0])).to(pairs.dtype)
    out = losses.mcts_dpo(**pairs.sums, **pairs.counts, label=label, reduction="none").loss
    pairs.check(out[0], 0.65845704779)
    torch.testing.assert_close(out[1], losses.dpo(**pairs.sums, reduction="none").loss[1])


def test_mcts_dpo_ipo_divides_by_powers_of_the_lengths(exact):
    arguments = {**exact.sums, **exact.counts, "form": "ipo", "reduction": "none"}
    got = losses.mcts_dpo(**arguments, length_exponent=1.0).loss
    want = losses.ipo(**exact.sums, **exact.counts, reduction="none").loss
    torch.testing.assert_close(got, want)
    got = losses.mcts_dpo(**arguments, length_exponent=0.0).loss
    want = losses.ipo(**exact.sums, convention="summed", reduction="none").loss
    torch.testing.assert_close(got, want)
    got = losses.mcts_dpo(**arguments).loss
    want = (1 / 10**1.25 + 0.5 / 12**1.25 - 5) ** 2
    assert got[0].item() == pytest.approx(want, rel=1e-14)


def test_mcts_dpo_leaves_out_pairs_without_a_suffix(exact):
    sums = {name: x.requires_grad_("policy" in name) for name, x in exact.sums.items()}
    counts = {"chosen_counts": torch.tensor([10, 0]), "rejected_counts": torch.tensor([12, 3])}
    out = losses.mcts_dpo(**sums, **counts)
    alone = losses.dpo(**{name: x[:1] for name, x in sums.items()})
    assert torch.equal(out.loss, alone.loss)
    grads = torch.autograd.grad(out.loss, [sums["policy_chosen"], sums["policy_rejected"]])
    assert all(grad[1] == 0 and grad[0] != 0 for grad in grads)
    assert losses.mcts_dpo(**sums, **counts, reduction="none").loss[1] == 0


@pytest.mark.parametrize(
    ("loss", "drop"), [(losses.selm, ()), (losses.xpo, ("ref_extra",)), (losses.vpo, ())]
)
def test_without_a_bonus_the_exploration_losses_are_dpo(loss, drop, exact):
    extra = {name: x for name, x in exact.extra.items() if name not in drop}
    want = losses.dpo(**exact.sums, beta=0.1).loss
    assert torch.equal(loss(**exact.sums, **extra, beta=0.1, alpha=0.0).loss, want)


def test_xpo_is_selm_up_to_a_constant_and_selm_is_online_vpo(exact):
    arguments = {**exact.sums, "beta": 0.1, "reduction": "none"}
    xpo = losses.xpo(**arguments, extra=exact.extra["extra"], alpha=1e-3).loss
    selm = losses.selm(**arguments, **exact.extra, alpha=1e-2).loss
    torch.testing.assert_close(xpo - selm, 1e-3 * exact.extra["ref_extra"])
    online = losses.vpo(**arguments, **exact.extra, alpha=1e-2, setting="online").loss
    assert torch.equal(online, selm)
    offline = losses.vpo(**arguments, **exact.extra, alpha=1e-2).loss
    dpo = losses.dpo(**arguments).loss
    torch.testing.assert_close(offline - dpo, dpo - online)


def test_selm_on_the_chosen_response_adds_a_constant_gradient(exact):
    sums = exact.sums
    chosen = sums["policy_chosen"].requires_grad_()
    extra = {"extra": chosen, "ref_extra": sums["ref_chosen"]}
    arguments = {**sums, "beta": 0.1, "reduction": "sum"}
    got = torch.autograd.grad(losses.selm(**arguments, **extra, alpha=0.2).loss, chosen)[0]
    dpo = torch.autograd.grad(losses.dpo(**arguments).loss, chosen)[0]
    torch.testing.assert_close(got - dpo, exact(0.02, 0.02))


def test_xpo_on_ipo_is_the_sum_form(exact):
    extra = {"extra": exact.extra["extra"]}
    got = losses.xpo(**exact.sums, **extra, form="ipo", alpha=0.0).loss
    assert torch.equal(got, losses.ipo(**exact.sums, convention="summed").loss)


def test_offline_vpo_is_dpo_plus_likelihood(exact):
    sums = exact.sums
    got = losses.vpo(**sums, reduction="none").loss - losses.dpo(**sums, reduction="none").loss
    torch.testing.assert_close(got, -1e-3 * (sums["policy_chosen"] - sums["ref_chosen"]))


def test_bonus_metric_is_the_mean_of_the_second_term(exact):
    bonus = losses.selm(**exact.sums, **exact.extra).metrics["bonus"]
    exact.check(bonus, 1e-5 * (-0.5 + 0.3) / 2)


def test_accelerated_po_extrapolates_the_reference_margins(pairs):
    # Margins 1.5, -1 of the reference and 0.4, -0.2 of the model before: 1.83, -1.24 at alpha 0.3.
    zero = pairs(0.0, 0.0)
    out = losses.accelerated_po(
        zero, zero, pairs(1.5, -1.0), zero, [pairs(0.4, -0.2)], [zero], beta=1.0, alpha=0.3
    )
    pairs.check(out.rejected_rewards - out.chosen_rewards, [1.83, -1.24])
    want = -logsigmoid(torch.tensor([-1.83, 1.24], dtype=torch.float64)).mean()
    pairs.check(out.loss, want.item())


def test_accelerated_po_without_extrapolation_is_dpo(exact):
    want = losses.dpo(**exact.sums).loss
    assert torch.equal(losses.accelerated_po(**exact.sums).loss, want)
    assert torch.equal(
        losses.accelerated_po(**exact.sums, **exact.history(1), alpha=0.0).loss, want
    )
    used = losses.accelerated_po(**exact.sums, **exact.history(1)).loss
    assert torch.equal(losses.accelerated_po(**exact.sums, **exact.history(2)).loss, used)


def _policy(pairs):
    return {name: x for name, x in pairs.sums.items() if "policy" in name} | pairs.counts


def test_power_vector(pairs):
    pairs.check_pairs(
        losses.power, [0.680459648013, 0.509354450332], 0.594907049173, **_policy(pairs)
    )
    out = losses.power(**_policy(pairs))
    pairs.check(out.chosen_rewards - out.rejected_rewards, [0.05, 0.44])


def test_power_dl_vector_with_the_updated_label(pairs):
    ones = pairs(1.0, 1.0)
    before = losses.power_dl(**_policy(pairs), label=ones)
    label = 0.9 * ones + 0.1 * before.metrics["win_rates"]
    pairs.check(label, [0.951249739648, 0.960825903075])
    per_pair = [0.682897161031, 0.526591052979]
    pairs.check_pairs(losses.power_dl, per_pair, 0.604744107005, **_policy(pairs), label=label)


def test_power_dl_with_labels_of_1_is_power_and_with_its_own_beliefs_has_no_preference(exact):
    arguments = _policy(exact)
    power = losses.power(**arguments)
    ones = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(losses.power_dl(**arguments, label=ones).loss, power.loss)
    policy = [arguments[f"policy_{side}"].requires_grad_() for side in ("chosen", "rejected")]
    out = losses.power_dl(**arguments, label=power.metrics["win_rates"], eta=0.0)
    for grad in torch.autograd.grad(out.loss, policy):
        assert grad.abs().max() < 1e-16


def test_power_without_constants_is_simpo(exact):
    # With equal lengths the constants w cancel.
    arguments = _policy(exact) | {"rejected_counts": exact.counts["chosen_counts"]}
    got = losses.power(**arguments, eta=0.0).loss
    torch.testing.assert_close(got, losses.simpo(**arguments, beta=2.0, gamma=0.0).loss)


def test_power_with_one_token_each_is_reference_free_dpo(exact):
    ones = {"chosen_counts": torch.ones(2), "rejected_counts": torch.ones(2)}
    got = losses.power(**(_policy(exact) | ones), eta=0.0).loss
    zeros = torch.zeros(2, dtype=torch.float64)
    sums = exact.sums | {"ref_chosen": zeros, "ref_rejected": zeros}
    torch.testing.assert_close(got, losses.dpo(**sums, beta=2.0).loss)


def test_the_maximiser_of_reward_plus_weighted_entropy_has_the_rewards_of_power():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log().requires_grad_()
    logps, counts = torch.log_softmax(logits, 0), torch.tensor([3, 5, 2, 7])
    reward = losses.power(logps, logps, counts, counts, beta=2.0).chosen_rewards + 0.7
    objective = (logps.exp() * (reward - 2 / counts.double() * logps)).sum()
    assert torch.autograd.grad(objective, logits)[0].abs().max() < 1e-16


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda f: losses.vpo(**f.sums, setting="online"), "vpo: extra, ref_extra: expected both"),
        (lambda f: losses.vpo(**f.sums, extra=f(1, 1)), "vpo: extra, ref_extra: expected both"),
        (lambda f: losses.vpo(**f.sums, setting="both"), "vpo: setting: expected one of offline"),
        (lambda f: losses.selm(**f.sums, **f.extra, alpha=-1.0), "selm: alpha: expected a finite"),
        (lambda f: losses.xpo(**f.sums, extra=f(1)), r"xpo: extra: expected shape \[2\]"),
        (lambda f: losses.mcts_dpo(**f.sums, **f.counts, form="dpo"), "mcts_dpo: form: expected"),
        (lambda f: losses.soft_label_ce(**f.sums, label=f(1)), r"label: expected shape \[2\]"),
        (
            lambda f: losses.accelerated_po(**f.sums, history_chosen=[f(1, 1)]),
            "accelerated_po: history_chosen, history_rejected: expected one length, got 1 and 0",
        ),
        (lambda f: losses.power(**_policy(f), eta=-1.0), "power: eta: expected a finite"),
    ],
)
def test_errors_name_what_came(call, match, exact):
    with pytest.raises(ValueError, match=match):
        call(exact)


def test_labels_and_targets_do_not_spread_over_the_batch():
    margins, column = torch.zeros(3), torch.zeros(3, 1)
    with pytest.raises(ValueError, match=r"soft_logistic: label: .* \[3\] .* got \[3, 1\]"):
        losses.soft_logistic(margins, column)
    with pytest.raises(ValueError, match=r"squared: target: .* \[3\] .* got \[3, 1\]"):
        losses.squared(margins, column)
    assert losses.squared(margins, torch.ones(())).tolist() == [1.0] * 3


def test_margin_coefficients_are_finite():
    streams = {"policy": (torch.zeros(2), torch.zeros(2))}
    with pytest.raises(ValueError, match=r"margin: coefficients\['policy'\]: expected a finite"):
        losses.margin(streams, {"policy": math.nan})
