"""Sums of losses: likelihood, mixtures, rationales, fast and slow adapters."""

from __future__ import annotations

import math

import pytest
import torch

from fastpo import losses
from fastpo.losses import iterative_rpo, mixture, mpo_internvl, ofs_dpo, rpo, sft

EXTRA = [-12.0, -20.0, -8.0]
SLOW = [-2.6, -3.5, -1.3], [-2.6, -2.2, -4.2]


def test_published_vectors(f1_cast, vector_dtype, check_vector):
    sums, counts = f1_cast.sums, f1_cast.chosen_counts
    check_vector(rpo(*sums, counts, beta=0.5).loss, 0.6448504838)
    check_vector(mpo_internvl(*sums, counts, beta=0.5).loss, 1.7292317655)
    check_vector(sft(sums[0], counts).loss, 0.95)
    check_vector(sft(sums[0], counts, nll_mean="sequence_mean").loss, 1.0777777778)
    extra = torch.tensor(EXTRA, dtype=vector_dtype)
    out = losses.rationale_rdpo(*sums, extra, beta=0.5, gamma=0.001, reduction="none")
    check_vector(out.loss, [1.2325473359, 1.4216568277, 1.3656148286])
    check_vector(losses.rationale_rdpo(*sums, extra, beta=0.5).loss, 1.3399396641)


def test_likelihood_terms_are_mixtures(f1):
    sums, counts = f1.sums, f1.chosen_counts
    for nll_mean in ("token_mean", "sequence_mean"):
        for reduction in ("mean", "sum", "none"):
            options = dict(beta=0.5, reduction=reduction)
            parts = {
                "dpo": losses.dpo(*sums, **options),
                "bco": losses.bco_pair(*sums, **options),
                "sft": sft(sums[0], counts, nll_mean, reduction),
            }
            names = dict(nll_mean=nll_mean, **options)
            for got, weights in (
                (rpo(*sums, counts, eta=0.3, **names), (1.0, 0.0, 0.3)),
                (iterative_rpo(*sums, counts, alpha=0.7, **names), (1.0, 0.0, 0.7)),
                (mpo_internvl(*sums, counts, **names), (0.8, 0.2, 1.0)),
                (mpo_internvl(*sums, counts, 0.5, 0.1, 0.2, 0.3, nll_mean, reduction),
                 (0.1, 0.2, 0.3)),
            ):  # fmt: skip
                want = mixture(parts, dict(zip(parts, weights, strict=True)))
                torch.testing.assert_close(got.loss, want.loss)
                torch.testing.assert_close(got.chosen_rewards, want.chosen_rewards)
                mean = sft(sums[0], counts, nll_mean).loss
                torch.testing.assert_close(got.metrics["nll"], mean)


def test_iterative_rpo_takes_the_papers_mean_by_default(f1):
    got = iterative_rpo(*f1.sums, f1.chosen_counts, beta=0.5).loss
    want = losses.dpo(*f1.sums, beta=0.5).loss + 1.0777777777777777
    torch.testing.assert_close(got, want)


def test_without_likelihood_is_dpo(f1):
    want = losses.dpo(*f1.sums, beta=0.3).loss
    options = dict(beta=0.3)
    for got in (
        rpo(*f1.sums, f1.chosen_counts, eta=0.0, **options),
        iterative_rpo(*f1.sums, f1.chosen_counts, alpha=0.0, **options),
        mpo_internvl(*f1.sums, f1.chosen_counts, 0.3, 1.0, 0.0, 0.0),
    ):
        torch.testing.assert_close(got.loss, want)


def test_rpo_with_a_baseline_response_of_its_own(f1):
    sums, counts = torch.tensor([-4.0, -2.0, -6.0]), torch.tensor([2, 1, 3])
    got = rpo(*f1.sums, f1.chosen_counts, eta=0.5, nll_sums=sums, nll_counts=counts).loss
    torch.testing.assert_close(got, losses.dpo(*f1.sums, beta=0.01).loss + 0.5 * 2.0)
    with pytest.raises(ValueError, match="rpo: nll_sums, nll_counts: expected both or neither"):
        rpo(*f1.sums, f1.chosen_counts, nll_sums=sums)


def test_mixture_names_its_parts(f1):
    parts = {"sft": sft(f1.policy_chosen, f1.chosen_counts), "dpo": losses.dpo(*f1.sums)}
    out = mixture(parts, {"dpo": 2.0, "sft": 0.5})
    torch.testing.assert_close(out.loss, 2 * parts["dpo"].loss + 0.5 * parts["sft"].loss)
    assert out.metrics == {name: part.loss for name, part in parts.items()}
    assert torch.equal(out.chosen_rewards, parts["dpo"].chosen_rewards)


def test_mixture_passes_gradients_and_detaches_metrics(f1):
    policy = f1.policy_chosen.clone().requires_grad_()
    parts = {"dpo": losses.dpo(policy, *f1.sums[1:]), "sft": sft(policy, f1.chosen_counts)}
    out = mixture(parts, {"dpo": 1.0, "sft": 0.5})
    (got,) = torch.autograd.grad(out.loss, policy)
    assert not any(metric.requires_grad for metric in out.metrics.values())
    want = rpo(policy, *f1.sums[1:], f1.chosen_counts, beta=0.1, eta=0.5).loss
    torch.testing.assert_close(got, torch.autograd.grad(want, policy)[0])


def test_mixture_errors(f1):
    pair, single = losses.dpo(*f1.sums), sft(f1.policy_chosen, f1.chosen_counts)
    with pytest.raises(ValueError, match="mixture: weights: expected the names of outputs"):
        mixture({"dpo": pair}, {"hinge": 1.0})
    with pytest.raises(ValueError, match=r"mixture: weights: .* 0 over pairs"):
        mixture({"sft": single}, {"sft": 1.0})
    with pytest.raises(ValueError, match=r"mixture: weights\['dpo'\]: expected a finite number"):
        mixture({"dpo": pair}, {"dpo": math.inf})
    many = sft(f1.policy_chosen, f1.chosen_counts, reduction="none")
    with pytest.raises(ValueError, match=r"mixture: sft: expected shape \[\], got \[3\]"):
        mixture({"dpo": pair, "sft": many}, {"dpo": 1.0, "sft": 1.0})


def test_rationale_at_gamma_0_is_the_loss_plus_log_2(f1):
    extra = torch.tensor(EXTRA, dtype=torch.float64)
    got = losses.rationale_rdpo(*f1.sums, extra, beta=0.5, gamma=0.0).loss
    torch.testing.assert_close(got, losses.dpo(*f1.sums, beta=0.5).loss + math.log(2))
    args = (*f1.sums[:2], *f1.counts)
    got = losses.rationale_rorpo(*args, extra, f1.chosen_counts, gamma=0.0)
    want = losses.orpo(*args)
    torch.testing.assert_close(got.loss, want.loss + math.log(2))
    torch.testing.assert_close(got.metrics["nll"], want.metrics["nll"])


def test_rationale_term_is_squashed_and_trained(f1):
    extra = torch.tensor(EXTRA, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([4, 5, 2])
    sums = losses.rationale_rdpo(*f1.sums, extra, gamma=0.1, reduction="sum").loss
    (got,) = torch.autograd.grad(sums, extra)
    torch.testing.assert_close(got, -0.1 * torch.sigmoid(-0.1 * extra.detach()))
    args = (*f1.sums[:2], *f1.counts, extra, counts)
    (got,) = torch.autograd.grad(
        losses.rationale_rorpo(*args, gamma=0.1, reduction="sum").loss, extra
    )
    means = extra.detach() / counts
    torch.testing.assert_close(got, -0.1 * torch.sigmoid(-0.1 * means) / counts)


def adapters(f1, dtype=torch.float64):
    fast = [x.to(dtype).clone().requires_grad_() for x in f1.sums[:2]]
    slow = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in SLOW]
    return fast, slow


def test_ofs_dpo_vector(f1_cast, vector_dtype, check_vector):
    fast, slow = adapters(f1_cast, vector_dtype)
    refs = f1_cast.sums[2:]
    out = ofs_dpo(*fast, *refs, *slow, alpha=0.1, beta=0.5)
    check_vector(out.metrics["fast_loss"], 0.7094985005)
    check_vector(out.metrics["slow_loss"], 0.5682215553)
    check_vector(out.loss.detach(), 1.2777200558)
    out.loss.backward()
    check_vector(fast[0].grad, [-0.0768140837, -0.0941658859, -0.0895837673])
    check_vector(slow[0].grad, [-0.0808875967, -0.0900000870, -0.0895837673])
    check_vector(fast[1].grad, (-fast[0].grad).tolist())
    check_vector(slow[1].grad, (-slow[0].grad).tolist())
    # L_FS, from the difference that alpha makes.
    options = dict(beta=0.5, reduction="none")
    chase = losses.dpo(*fast, *slow, **options).loss.detach()
    check_vector(chase, [0.6443966601, 0.7443966601, 0.6931471806])
    one = ofs_dpo(*fast, *refs, *slow, alpha=1.0, beta=0.5).metrics
    check_vector(one["fast_loss"] - one["fast_dpo"], chase.mean().item())
    check_vector(one["slow_dpo"] - one["slow_loss"], chase.mean().item())


def test_ofs_dpo_holds_the_other_adapter(f1):
    """Each gradient is that of the adapter's own bracket with the other one a constant."""
    fast, slow = adapters(f1)
    refs, alpha, options = f1.sums[2:], 0.3, dict(beta=0.5)
    out = ofs_dpo(*fast, *refs, *slow, alpha=alpha, **options)
    got = torch.autograd.grad(out.loss, (*fast, *slow))
    lead = losses.dpo(*fast, *refs, **options).loss
    lead = lead + alpha * losses.dpo(*fast, *(x.detach() for x in slow), **options).loss
    # The slow adapter on the side of the reference: swap its sides to differentiate it.
    chase = losses.dpo(*slow[::-1], *(x.detach() for x in fast[::-1]), **options).loss
    chase = losses.dpo(*slow, *refs, **options).loss - alpha * chase
    want = *torch.autograd.grad(lead, fast), *torch.autograd.grad(chase, slow)
    torch.testing.assert_close(got, want)


def test_ofs_dpo_without_chase_is_two_dpo_runs(f1):
    fast, slow = adapters(f1)
    out = ofs_dpo(*fast, *f1.sums[2:], *slow, alpha=0.0, beta=0.5)
    leader = losses.dpo(*fast, *f1.sums[2:], beta=0.5)
    chaser = losses.dpo(*slow, *f1.sums[2:], beta=0.5)
    torch.testing.assert_close(out.loss, leader.loss + chaser.loss)
    torch.testing.assert_close(out.metrics["fast_dpo"], leader.loss.detach())
    torch.testing.assert_close(out.metrics["slow_dpo"], chaser.loss.detach())
    got = torch.autograd.grad(out.loss, (*fast, *slow))
    torch.testing.assert_close(got, torch.autograd.grad(leader.loss + chaser.loss, (*fast, *slow)))


def test_ofs_dpo_at_the_start(f1):
    out = ofs_dpo(*f1.sums, *f1.sums[:2], alpha=1.0)
    gap = out.metrics["fast_loss"] - out.metrics["fast_dpo"]
    assert gap.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda s, n: rpo(*s, n, eta=-1), "rpo: eta: .* >= 0"),
        (lambda s, n: iterative_rpo(*s, n, alpha=-1), "iterative_rpo: alpha: .* >= 0"),
        (lambda s, n: iterative_rpo(*s, n, nll_mean="mean"), "iterative_rpo: nll_mean: .* one of"),
        (lambda s, n: mpo_internvl(*s, n, bco_weight=-1), "mpo_internvl: bco_weight: .* >= 0"),
        (lambda s, n: sft(s[0], n, nll_mean="mean"), "sft: nll_mean: expected one of"),
        (lambda s, n: sft(s[0], n[:2]), r"sft: chosen_counts: expected shape \[3\]"),
        (lambda s, n: ofs_dpo(*s, *s[:2], alpha=-1), "ofs_dpo: alpha: .* >= 0"),
        (lambda s, n: losses.rationale_rdpo(*s, s[0][:2]), r"rationale_rdpo: extra: .* \[3\]"),
        (lambda s, n: losses.rationale_rdpo(*s, s[0], gamma=-1), "rationale_rdpo: gamma: .* >= 0"),
    ],
)
def test_options_out_of_range(call, match, f1):
    with pytest.raises(ValueError, match=match):
        call(f1.sums, f1.chosen_counts)
