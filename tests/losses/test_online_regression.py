"""Published vectors and properties of the losses that regress margins and log-ratios."""

from __future__ import annotations

import functools

import pytest
import torch
from online_pairs import Online
from torch.nn.functional import pad

from fastpo import losses
from fastpo.data.win_rates import bradley_terry_matrix, win_rates


@pytest.fixture
def pairs(vector_dtype) -> Online:
    return Online(vector_dtype)


@pytest.fixture
def exact() -> Online:
    return Online(torch.float64)


def _rates(f, chosen, rejected):
    return {"chosen_win_rates": f(*chosen), "rejected_win_rates": f(*rejected)}


VECTORS = {
    "inpo": (
        losses.inpo,
        lambda f: f.history(1) | {"eta": 0.5},
        [1.111111111111e-3, 3.004444444444],
        1.50277777778,
    ),
    "inpo_small_eta": (
        losses.inpo,
        lambda f: f.history(1) | {"eta": 0.0075},
        [4307.734444444445, 4542.760000000001],
        4425.24722222,
    ),
    "mnpo": (
        losses.mnpo,
        lambda f: f.history(2) | {"eta": 0.5},
        [0.027777777778, 3.24],
        1.63388888889,
    ),
    "mnpo_weights": (
        losses.mnpo,
        lambda f: f.history(2) | {"eta": 0.5, "history_weights": [1.0, 0.5]},
        [0.014938271605, 3.16049382716],
        1.58771604938,
    ),
    "egpo": (
        losses.egpo,
        lambda f: _rates(f, (0.7, 0.4), (0.45, 0.65)),
        [1.0, 2.25],
        1.625,
    ),
    "egpo_length_form": (
        losses.egpo,
        lambda f: _rates(f, (0.7, 0.4), (0.45, 0.65)) | f.counts | {"convention": "averaged"},
        [5.561736111111, 6.027025],
        5.79438055556,
    ),
    "rebel": (
        losses.rebel,
        lambda f: {"chosen_scores": f(1.3, 0.2), "rejected_scores": f(0.4, 0.5)},
        [0.36, 0.49],
        0.425,
    ),
    "sppo": (
        losses.sppo,
        lambda f: _rates(f, (0.8, 0.7), (0.3, 0.25)) | {"beta": 0.01},
        [610.625, 535.25],
        572.9375,
    ),
    "sppo_single": (
        losses.sppo_single,
        lambda f: {"label": f(0.9, 0.6), "beta": 0.01},
        [1540.625, 110.25],
        825.4375,
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_published_vector(name, pairs):
    loss, further, per_pair, mean = VECTORS[name]
    pairs.check_pairs(loss, per_pair, mean, **pairs.sums, **further(pairs))


def test_sppo_with_the_published_beta(pairs):
    arguments = pairs.sums | _rates(pairs, (0.8, 0.7), (0.3, 0.25))
    pairs.check(losses.sppo(**arguments).loss, 58037.9375)


def test_sppo_with_hard_win_rates_is_half_of_the_hard_form(pairs):
    arguments = pairs.sums | _rates(pairs, (1.0, 1.0), (0.0, 0.0)) | {"beta": 0.1}
    pairs.check(2 * losses.sppo(**arguments, reduction="none").loss, [36.25, 60.5])
    pairs.check(2 * losses.sppo(**arguments).loss, 48.375)


def test_margins_behind_inpo_and_mnpo(exact):
    # (h - 1)^2 and its slope 2 (h - 1) give h back.
    for loss, count, h in (
        (losses.inpo, 1, [1.033333333333, -0.733333333333]),
        (losses.mnpo, 2, [1.166666666667, -0.8]),
    ):
        out = loss(**exact.sums, **exact.history(count), eta=0.5)
        exact.check((out.chosen_rewards - out.rejected_rewards) / 0.5, h)


def test_inpo_with_the_whole_ratio_is_ipo_and_without_it_self_play(exact):
    want = losses.ipo(**exact.sums, beta=0.5, convention="summed").loss
    for history in ({}, exact.history(1)):
        assert torch.equal(losses.inpo(**exact.sums, **history, eta=0.5, ratio=1.0).loss, want)
    history = exact.history(1)
    own = exact.sums | {
        "ref_chosen": history["history_chosen"][0],
        "ref_rejected": history["history_rejected"][0],
    }
    want = losses.ipo(**own, beta=0.5, convention="summed").loss
    assert torch.equal(losses.inpo(**exact.sums, **history, eta=0.5, ratio=0.0).loss, want)


def test_in_the_first_round_inpo_starts_at_the_reference_and_mnpo_loses_the_share(exact):
    sums = exact.sums
    want = losses.ipo(**sums, beta=0.5, convention="summed", reduction="none").loss
    got = losses.inpo(**sums, eta=0.5, reduction="none").loss
    torch.testing.assert_close(got, want)
    got = losses.mnpo(**sums, eta=0.5, ratio=0.25, reduction="none").loss
    # D(policy) = 2.5, -1.5 and D(ref) = 1, -0.5.
    torch.testing.assert_close(got, (exact(2.5, -1.5) - 0.25 * exact(1.0, -0.5) - 1).square())
    limited = losses.mnpo(**sums, **exact.history(2), eta=0.5, ratio=0.25, max_history_t=0)
    torch.testing.assert_close(limited.loss, got.mean())


def test_mnpo_with_one_history_is_inpo(exact):
    want = losses.inpo(**exact.sums, **exact.history(1), eta=0.5).loss
    got = losses.mnpo(**exact.sums, **exact.history(1), eta=0.5).loss
    assert torch.equal(got, want)
    one = losses.mnpo(**exact.sums, **exact.history(2), eta=0.5, max_history_t=1).loss
    assert torch.equal(one, want)
    weighted = losses.mnpo(**exact.sums, **exact.history(2), eta=0.5, history_weights=[3.0, 0.0])
    assert torch.equal(weighted.loss, want)


def test_mnpo_with_equal_histories_does_not_see_their_weights(exact):
    history = {name: streams * 3 for name, streams in exact.history(1).items()}
    want = losses.inpo(**exact.sums, **exact.history(1), eta=0.5).loss
    for weights in (None, [0.2, 0.7, 0.4]):
        arguments = history | {"history_weights": weights, "max_history_t": 3}
        got = losses.mnpo(**exact.sums, **arguments, eta=0.5).loss
        torch.testing.assert_close(got, want)


def test_mnpo_weights_of_sum_0_are_uniform_and_ratio_1_is_ipo(exact):
    arguments = exact.sums | exact.history(2) | {"eta": 0.5}
    uniform = losses.mnpo(**arguments).loss
    assert torch.equal(losses.mnpo(**arguments, history_weights=[0.0, 0.0]).loss, uniform)
    want = losses.ipo(**exact.sums, beta=0.5, convention="summed").loss
    assert torch.equal(losses.mnpo(**arguments, ratio=1.0).loss, want)


def test_rebel_reduces_to_ipo_and_online_ipo_and_is_symmetric(exact):
    sums = exact.sums
    # eta (r_1 - r_2) = 1 / (2 tau)
    scores = {"chosen_scores": exact(2.0, 2.0), "rejected_scores": exact(0.0, 0.0)}
    want = losses.ipo(**sums, beta=0.1, convention="summed").loss
    assert torch.equal(losses.rebel(**sums, **scores, eta=2.5).loss, want)
    rates = {"chosen_win_rates": exact(0.7, 0.4), "rejected_win_rates": exact(0.45, 0.65)}
    scores = {name.replace("win_rates", "scores"): rate for name, rate in rates.items()}
    got = losses.rebel(**sums, **scores, eta=10.0).loss
    torch.testing.assert_close(got, losses.egpo(**sums, **rates, beta=0.1).loss)
    arguments = sums | scores
    other = {"chosen": "rejected", "rejected": "chosen"}
    swap = lambda name: "_".join(other.get(word, word) for word in name.split("_"))
    swapped = {name: arguments[swap(name)] for name in arguments}
    want = losses.rebel(**arguments, reduction="none").loss
    torch.testing.assert_close(losses.rebel(**swapped, reduction="none").loss, want)


def test_online_ipo_is_egpo_against_the_other_response_and_ipo_when_certain(exact):
    sums = exact.sums
    label = exact(0.8, 0.3)
    half = torch.full_like(label, 0.5)
    want = losses.egpo(**sums, chosen_win_rates=label, rejected_win_rates=half).loss
    assert torch.equal(losses.online_ipo(**sums, label=label).loss, want)
    certain = losses.online_ipo(**sums, label=torch.ones_like(label)).loss
    want = losses.ipo(**sums, convention="summed").loss
    assert torch.equal(certain, want)


def test_sppo_at_a_win_rate_of_a_half_has_its_minimum_at_the_reference(exact):
    ref = {"ref_chosen": exact(-13.0, -30.0), "ref_rejected": exact(-14.0, -29.5)}
    policy = {name.replace("ref", "policy"): x.clone().requires_grad_() for name, x in ref.items()}
    out = losses.sppo(**policy, **ref, **_rates(exact, (0.5, 0.5), (0.5, 0.5)))
    assert out.loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(out.loss, list(policy.values())))


def test_sppo_single_is_sppo_against_each_other(exact):
    label = exact(0.9, 0.6)
    rates = {"chosen_win_rates": label, "rejected_win_rates": 1 - label}
    want = losses.sppo(**exact.sums, **rates, beta=0.01).loss
    assert torch.equal(losses.sppo_single(**exact.sums, label=label, beta=0.01).loss, want)


def test_win_rates_of_sppo_count_the_response_itself():
    preferences = bradley_terry_matrix(torch.tensor([1.2, -0.3, 0.5], dtype=torch.float64))
    want = torch.tensor([0.661920749454, 0.330817014226, 0.50726223632], dtype=torch.float64)
    got = win_rates(preferences, include_self=True)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def _prefixes(pairs, chunks):
    torch.manual_seed(0)
    mask = torch.arange(9)[None] < torch.tensor([[9], [6]])
    tokens = {name: -torch.rand(2, 9, dtype=pairs.dtype) for name in pairs.sums}
    return (
        tokens,
        mask,
        {
            name: losses.prefix_sums(values, mask, chunks)[0].flatten()
            for name, values in tokens.items()
        },
    )


def test_prefixes_end_in_the_second_half(exact):
    tokens, mask, _ = _prefixes(exact, 1)
    values = tokens["policy_chosen"].requires_grad_()
    sums, counts = losses.prefix_sums(values, mask, 3)
    # 9 tokens: 4 + 2 j, at most 9; 6 tokens: 3 + j.
    assert counts.tolist() == [[6, 8, 9], [4, 5, 6]]
    for row, column in ((0, 1), (1, 0)):
        want = values[row, : counts[row, column]].sum()
        torch.testing.assert_close(sums[row, column], want)
    assert torch.autograd.gradcheck(lambda x: losses.prefix_sums(x, mask, 3)[0], values)
    # Padding, even NaN, changes nothing.
    padded = pad(values.detach().masked_fill(~mask, torch.nan), (0, 3), value=torch.nan)
    assert torch.equal(losses.prefix_sums(padded, pad(mask, (0, 3)), 3)[0], sums)


def test_prefixes_of_short_and_empty_responses():
    mask = torch.arange(3)[None] < torch.tensor([[1], [0], [3]])
    sums, counts = losses.prefix_sums(-torch.ones(3, 3), mask, 4)
    assert counts.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [2, 3, 3, 3]]
    assert torch.equal(sums, -counts.float())
    assert losses.prefix_sums(torch.zeros(0, 3), mask[:0], 2)[0].shape == (0, 2)


def test_egpo_on_prefixes_is_the_average_over_cut_points(exact):
    tokens, mask, sums = _prefixes(exact, 2)
    rates = _rates(exact, (0.7, 0.4), (0.45, 0.65))
    counts = losses.prefix_sums(tokens["policy_chosen"], mask, 2)[1].flatten()
    repeated = {name: rate.repeat_interleave(2) for name, rate in rates.items()}
    averaged = functools.partial(losses.egpo, convention="averaged")
    got = averaged(**sums, **repeated, chosen_counts=counts, rejected_counts=counts).loss
    terms = []
    # 9 tokens: 4 + 3 j, at most 9; 6 tokens: 3 + 2 j, at most 6.
    for cuts in ([[7], [5]], [[9], [6]]):
        inside = torch.arange(9)[None] < torch.tensor(cuts)
        plain = {name: (values * inside).sum(1) for name, values in tokens.items()}
        count = inside.sum(1)
        terms.append(averaged(**plain, **rates, chosen_counts=count, rejected_counts=count).loss)
    torch.testing.assert_close(got, sum(terms) / 2)


CONDITIONAL = {
    "chosen_given_rejected": [-11.0, -28.0],
    "ref_chosen_given_rejected": [-12.0, -28.5],
    "rejected_given_chosen": [-15.0, -30.0],
    "ref_rejected_given_chosen": [-14.5, -29.0],
    "rejected_given_rejected": [-9.0, -20.0],
    "ref_rejected_given_rejected": [-9.5, -20.5],
    "chosen_given_chosen": [-8.0, -19.0],
    "ref_chosen_given_chosen": [-8.2, -19.6],
}


def _srpo(pairs):
    return pairs.sums | {name: pairs(*values) for name, values in CONDITIONAL.items()}


def test_srpo_vectors(pairs):
    pairs.check_pairs(losses.srpo, [0.1581, 0.2042125], 0.18115625, **_srpo(pairs))
    joint = losses.srpo(**_srpo(pairs), alpha=0.0, reduction="none").loss
    pairs.check(joint, [0.1225, 0.225625])
    improver = losses.srpo(**_srpo(pairs), alpha=1.0, reduction="none").loss
    pairs.check(improver, [0.1937, 0.1828])
    metrics = losses.srpo(**_srpo(pairs)).metrics
    assert torch.equal(metrics["joint"], joint.mean())
    assert torch.equal(metrics["improver"], improver.mean())


def test_srpo_does_not_see_the_order_of_the_pair(exact):
    arguments = _srpo(exact)
    other = {"chosen": "rejected", "rejected": "chosen"}
    swap = lambda name: "_".join(other.get(word, word) for word in name.split("_"))
    swapped = {name: arguments[swap(name)] for name in arguments}
    label = exact(0.9, 0.3)
    for alpha in (0.0, 1.0):
        options = {"alpha": alpha, "reduction": "none"}
        want = losses.srpo(**arguments, label=label, **options).loss
        got = losses.srpo(**swapped, label=1 - label, **options).loss
        torch.testing.assert_close(got, want)


def test_srpo_with_the_improver_at_the_reference_is_ipo(exact):
    arguments = _srpo(exact)
    for name in CONDITIONAL:
        if not name.startswith("ref"):
            arguments[name] = arguments[f"ref_{name}"]
    got = losses.srpo(**arguments, alpha=0.0).loss
    want = losses.ipo(**exact.sums, beta=0.05, convention="summed").loss
    torch.testing.assert_close(got, 0.1**2 / 4 * want)


def test_every_conditional_log_prob_gets_a_gradient_and_no_reference_does(exact):
    arguments = {name: x.requires_grad_() for name, x in _srpo(exact).items()}
    losses.srpo(**arguments).loss.backward()
    for name, tensor in arguments.items():
        assert (tensor.grad is None) == name.startswith("ref"), name


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda f: losses.inpo(**f.sums, ratio=1.5), r"inpo: ratio: expected a number in \[0, 1\]"),
        (lambda f: losses.inpo(**f.sums, eta=0.0), "inpo: eta: expected a positive finite"),
        (
            lambda f: losses.inpo(**f.sums, history_chosen=[f(1, 1)]),
            "inpo: history_chosen, history_rejected: expected one length, got 1 and 0 streams",
        ),
        (
            lambda f: losses.mnpo(**f.sums, **f.history(2), history_weights=[1.0]),
            r"mnpo: history_weights: expected 2 finite numbers >= 0, got \[1.0\]",
        ),
        (
            lambda f: losses.mnpo(**f.sums, **f.history(2), history_weights=[1.0, -1.0]),
            "mnpo: history_weights: expected 2 finite",
        ),
        (lambda f: losses.mnpo(**f.sums, max_history_t=-1), "mnpo: max_history_t: expected a"),
        (
            lambda f: losses.mnpo(**f.sums, history_chosen=[f(1)], history_rejected=[f(1)]),
            r"mnpo: history_chosen\[0\]: expected shape \[2\] as policy_chosen, got \[1\]",
        ),
        (
            lambda f: losses.egpo(**f.sums, **_rates(f, (1, 1), (0, 0)), convention="averaged"),
            "egpo: chosen_counts, rejected_counts: expected token counts",
        ),
        (lambda f: losses.srpo(**_srpo(f), alpha=2.0), "srpo: alpha: expected a number in"),
        (
            lambda f: losses.prefix_sums(torch.ones(2, 3), torch.ones(2, 3), 2),
            r"prefix_sums: mask: expected torch.bool \[2, 3\], got torch.float32",
        ),
        (
            lambda f: losses.prefix_sums(torch.ones(2), torch.ones(2) > 0, 2),
            r"prefix_sums: values: expected \[B, T\], got \[2\]",
        ),
        (
            lambda f: losses.prefix_sums(torch.ones(2, 1), torch.ones(2, 1) > 0, 0),
            "prefix_sums: chunks: expected a number > 0, got 0",
        ),
    ],
)
def test_errors_name_what_came(call, match, exact):
    with pytest.raises(ValueError, match=match):
        call(exact)
