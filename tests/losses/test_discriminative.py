"""Published vectors and properties of the losses that set the better of a group above the worse."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn.functional import logsigmoid

import fastpo
from fastpo.losses import disco, discob, dpo, gepo, trpa

F64 = torch.float64
# The batch of the vectors: four responses to one prompt, token log-probs, right or wrong.
LOGPROBS = [[-0.5, -1.2, -0.3], [-0.7, -2.0, 0.0], [-1.1, -0.4, -0.9], [-0.2, 0.0, 0.0]]
OLD = [[-0.6, -1.0, -0.35], [-0.9, -1.5, 0.0], [-1.5, -0.5, -0.8], [-0.1, 0.0, 0.0]]
TOKENS = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()
RIGHT = torch.tensor([[True, False, True, False]])
RATIOS = [0.1, -0.05, 0.02, 0.2]
LEVELS = torch.tensor([[1, 2, 2, 3]])


@pytest.fixture
def groups():
    """Four prompts with five responses: sums, reference sums, counts, levels and labels."""
    generator = torch.Generator().manual_seed(3)
    policy, ref = -3 * torch.rand(2, 4, 5, dtype=F64, generator=generator)
    counts = torch.randint(1, 5, (4, 5), generator=generator)
    levels = torch.tensor([[1, 2, 2, 4, 3], [2, 2, 3, 1, 1], [3, 1, 2, 2, 1], [1, 1, 2, 3, 4]])
    return policy, ref, counts, levels, levels == 1


CALLS = {
    "trpa": lambda p, r, n, v, d, **o: trpa(p, r, n, v, beta=0.7, **o),
    "disco": lambda p, r, n, v, d, **o: disco(p, d, **o),
    "disco_log_probs": lambda p, r, n, v, d, **o: disco(p, d, tau=10.0, **o),
    "discob": lambda p, r, n, v, d, **o: discob(p, d, **o),
    "gepo": lambda p, r, n, v, d, **o: gepo(p, r, d, beta=0.7, **o),
    "gepo_ddof": lambda p, r, n, v, d, **o: gepo(p, r, d, ddof=1, variance_of="reward", **o),
}


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


# ------------------------------------------------------------------ TRPA


def _ratios(dtype):
    return torch.tensor([RATIOS], dtype=dtype)


def test_trpa_vectors(vector_dtype, check_vector):
    ratios = _ratios(vector_dtype)
    zero, ones = torch.zeros_like(ratios), torch.ones(1, 4)
    out = trpa(ratios, zero, ones, LEVELS)
    check_vector(out.loss, 0.6942816837)
    check_vector(out.rewards, [[0.1 * q for q in RATIOS]])
    assert out.metrics["pairs"] == 5
    # Means of responses of three tokens.
    check_vector(trpa(3 * ratios, zero, 3 * ones, LEVELS).loss, 0.6942816837)
    alike = trpa(ratios, zero, ones, torch.ones_like(LEVELS))
    check_vector(alike.loss, 0.6610480893)
    assert alike.metrics["pairs"] == 0


@pytest.mark.parametrize("anisotropy", [1.0, 2.5])
def test_trpa_is_the_mean_over_all_pairs_of_all_prompts(groups, anisotropy):
    policy, ref, counts, levels, _ = groups
    terms = []
    for p in range(4):
        q = (policy[p] - ref[p]) / counts[p]
        for i, j in itertools.permutations(range(5), 2):
            if levels[p, i] < levels[p, j]:
                scale = 0.3 * (anisotropy if levels[p, i] == 1 else 1)
                terms.append(-logsigmoid(scale * (q[i] - q[j])))
    options = dict(beta=0.3, anisotropy=anisotropy)
    got = trpa(policy, ref, counts, levels, **options)
    torch.testing.assert_close(got.loss, torch.stack(terms).mean())
    assert got.metrics["pairs"] == len(terms)
    per_prompt = trpa(policy, ref, counts, levels, reduction="none", **options).loss
    torch.testing.assert_close(per_prompt.mean(), got.loss)


def test_trpa_of_two_levels_is_dpo_on_means(f1):
    policy, ref = torch.stack(f1.sums[:2], 1), torch.stack(f1.sums[2:], 1)
    counts, levels = torch.stack(f1.counts, 1), torch.tensor([[1, 2]]).expand(3, 2)
    means = [x / n for x, n in zip(f1.sums, (*f1.counts, *f1.counts), strict=True)]
    got = trpa(policy, ref, counts, levels, beta=0.5, anisotropy=1.0, reduction="none").loss
    torch.testing.assert_close(got, dpo(*means, beta=0.5, reduction="none").loss)
    # With the best level in every pair, anisotropy is a factor of beta.
    got = trpa(policy, ref, counts, levels, beta=0.2, anisotropy=2.5, reduction="none").loss
    torch.testing.assert_close(got, dpo(*means, beta=0.5, reduction="none").loss)


def test_trpa_without_pairs_pushes_by_level(groups):
    policy, ref, counts, _, _ = groups
    policy = policy.requires_grad_()
    levels = torch.tensor([1, 3, 1, 2])[:, None].expand(4, 5)
    sign = torch.where(levels == 1, 1.0, -1.0)
    q = (policy - ref) / counts
    want = -logsigmoid(sign * q)
    out = trpa(policy, ref, counts, levels)
    torch.testing.assert_close(out.loss, want.mean())
    (grad,) = torch.autograd.grad(out.loss, policy)
    assert torch.equal(grad.sign(), -sign.double())
    # One pair in another prompt of the batch: pairs alone count.
    levels = levels.clone()
    levels[0, 0] = 2
    out = trpa(policy, ref, counts, levels)
    assert out.metrics["pairs"] == 4
    (grad,) = torch.autograd.grad(out.loss, policy)
    assert not grad[1:].any()


def test_trpa_responses_alone_in_their_group_have_no_pair():
    ratios = _ratios(F64).T
    out = trpa(ratios, torch.zeros_like(ratios), torch.ones(4, 1), LEVELS.T)
    want = -logsigmoid(torch.tensor([0.1, 0.05, -0.02, -0.2], dtype=F64))
    torch.testing.assert_close(out.loss, want.mean())


# ------------------------------------------------------------------ DisCO


@pytest.fixture
def batch(vector_dtype):
    """Token log-probs and the batch's KL, with their gradient."""
    logprobs = torch.tensor(LOGPROBS, dtype=vector_dtype).requires_grad_()
    old = torch.tensor(OLD, dtype=vector_dtype)
    kl = torch.where(TOKENS, old - logprobs, 0.0).sum() / TOKENS.sum()
    return logprobs, old, kl


def test_disco_vectors(batch, check_vector):
    logprobs, old, kl = batch
    scores = fastpo.sequence_means((logprobs - old).exp(), TOKENS).view(1, 4)
    check_vector(kl, 0.0055555556)
    out = disco(scores, RIGHT, kl=kl)
    check_vector(out.rewards, [[0.9917242558, 0.9139667089, 1.1672776779, 0.9048374180]])
    check_vector(out.loss, -0.1397798435)
    (grad,) = torch.autograd.grad(out.loss, logprobs, retain_graph=True)
    check_vector(grad[3, 0], -0.1558192471)
    check_vector(discob(scores, RIGHT, kl=kl).loss, -0.1397902614)
    means = fastpo.sequence_means(logprobs, TOKENS).view(1, 4)
    check_vector(disco(means, RIGHT, tau=10.0, kl=kl).loss, 0.0051641239)


def test_disco_at_a_large_tau_is_discob(groups):
    policy, _, _, _, right = groups
    got = disco(policy, right, tau=1e6, reduction="none").loss
    want = discob(policy, right, reduction="none").loss
    # The next term is the variance of the wrong ones over 2 tau.
    torch.testing.assert_close(got, want, rtol=0, atol=9.0 / 2e6)
    assert (got >= want - 1e-9).all()


def test_discob_of_mean_logprobs_is_reinforce(batch):
    logprobs, _, _ = batch
    means = fastpo.sequence_means(logprobs, TOKENS)
    advantages = torch.where(RIGHT[0], 0.5, -0.5).to(means)
    (got,) = torch.autograd.grad(discob(means.view(1, 4), RIGHT).loss, logprobs, retain_graph=True)
    (want,) = torch.autograd.grad(-(advantages * means).sum(), logprobs)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("loss", [disco, discob])
def test_disco_penalty_has_the_gradient_of_a_squared_hinge(loss):
    scores = torch.tensor([[0.9, 1.1]], dtype=F64)
    right = torch.tensor([[True, False]])
    for value in (0.5, 0.1, 0.05, 0.0, -0.3):
        kl = torch.tensor(value, dtype=F64, requires_grad=True)
        out = loss(scores, right, kl=kl, kl_weight=7.0, kl_max=0.1).loss
        excess = max(value - 0.1, 0.0)
        (grad,) = torch.autograd.grad(out, kl)
        assert grad.item() == pytest.approx(7.0 * excess, abs=1e-15)
        without = loss(scores, right).loss
        assert (out - without).item() == pytest.approx(7.0 * excess * value, abs=1e-15)


@pytest.mark.parametrize("loss", [disco, discob])
def test_disco_counts_prompts_with_answers_of_one_kind(loss, groups):
    policy, _, _, _, right = groups
    policy = policy.requires_grad_()
    one_sided = torch.tensor([True, False])[:, None].expand(2, 5)
    right = torch.cat((right[:2], one_sided))
    out = loss(policy, right)
    assert out.metrics["kept"].tolist() == [True, True, False, False]
    with torch.autograd.set_detect_anomaly(True):
        torch.autograd.grad(out.loss, policy, retain_graph=True)
    kept = loss(policy[:2], right[:2], reduction="none").loss
    torch.testing.assert_close(out.loss, kept.sum() / 4)
    (grad,) = torch.autograd.grad(out.loss, policy)
    assert not grad[2:].any()
    assert grad[:2].all()
    assert loss(policy[2:], right[2:]).loss == 0


# ------------------------------------------------------------------ GEPO


def test_gepo_vectors(vector_dtype, check_vector):
    policy = torch.tensor([[2.0, 1.0, 3.0, -1.0, 0.5]], dtype=vector_dtype)
    wins = torch.tensor([[True, True, True, False, False]])
    zero = torch.zeros_like(policy)
    check_vector(gepo(policy, zero, wins, variance_weight=0.0).loss, 0.5869620020)
    check_vector(gepo(policy, zero, wins).loss, 1.2536286687)
    check_vector(gepo(policy, zero, wins, variance_of="reward").loss, 0.5936286687)
    # Three winners: 3/2 of the population's variance.
    unbiased = gepo(policy, zero, wins, ddof=1).loss
    check_vector(unbiased, 0.5869620020 + 1.0)


def test_gepo_penalises_the_variance_of_the_log_ratios():
    """Means 0.5 and 0, beta 0.1; the winners' variance is 1.5^2."""
    policy = torch.tensor([[2.0, -1.0, 0.5, -0.5]], dtype=torch.float64)
    wins = torch.tensor([[True, True, False, False]])
    want = math.log1p(math.exp(-0.05)) + 2.25
    got = gepo(policy, torch.zeros_like(policy), wins).loss
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))
    assert round(got.item(), 3) == 2.918


@pytest.mark.parametrize("ddof", [0, 1])
def test_gepo_of_one_against_one_is_dpo(ddof, f1):
    policy, ref = torch.stack(f1.sums[:2], 1), torch.stack(f1.sums[2:], 1)
    wins = torch.tensor([[True, False]]).expand(3, 2)
    options = dict(beta=0.5, reduction="none")
    got = gepo(policy, ref, wins, ddof=ddof, variance_weight=3.0, **options)
    torch.testing.assert_close(got.loss, dpo(*f1.sums, **options).loss)


def test_gepo_without_variance_is_dpo_on_group_means(groups):
    policy, ref, _, _, wins = groups
    q = policy - ref
    gap = [q[p][wins[p]].mean() - q[p][~wins[p]].mean() for p in range(4)]
    got = gepo(policy, ref, wins, beta=0.4, variance_weight=0.0, reduction="none").loss
    torch.testing.assert_close(got, -logsigmoid(0.4 * torch.stack(gap)))


def test_gepo_leaves_prompts_of_one_kind_out_of_the_mean(groups):
    policy, ref, _, _, wins = groups
    wins = torch.cat((wins[:2], torch.tensor([True, False])[:, None].expand(2, 5)))
    out = gepo(policy, ref, wins)
    want = gepo(policy[:2], ref[:2], wins[:2], reduction="none").loss
    torch.testing.assert_close(out.loss, want.mean())
    parts = gepo(policy, ref, wins, reduction="none")
    assert parts.loss[2:].tolist() == [0, 0]
    assert parts.metrics["kept"].tolist() == [True, True, False, False]
    assert gepo(policy[2:], ref[2:], wins[2:]).loss == 0


# ------------------------------------------------------------------ all


@pytest.mark.parametrize("name", ["trpa", "disco"])
def test_each_prompt_carries_the_kl(name, groups):
    kl = torch.tensor(0.25, dtype=F64, requires_grad=True)
    added = 0.001 * 0.25 if name == "trpa" else 1e3 * (0.25 - 1e-4) * 0.25
    plain = CALLS[name](*groups, reduction="none").loss
    torch.testing.assert_close(CALLS[name](*groups, reduction="none", kl=kl).loss, plain + added)
    out = CALLS[name](*groups, kl=kl).loss
    torch.testing.assert_close(out, plain.mean() + added)
    (grad,) = torch.autograd.grad(out, kl)
    assert grad.item() == pytest.approx(added / 0.25)


def test_gradients_of_ragged_groups(call, groups):
    policy, *rest = groups
    mask = torch.arange(5) < torch.tensor([[5], [4], [2], [3]])
    for reduction in ("mean", "sum", "none"):
        function = lambda p, o=reduction: call(p, *rest, mask=mask, reduction=o).loss
        assert torch.autograd.gradcheck(function, policy.clone().requires_grad_())


@pytest.mark.parametrize("label", [True, False])
def test_padding_of_groups_may_hold_anything(label, call, groups, device):
    """Ragged groups against the same ones cut to their size."""
    groups = [x.to(device) for x in groups]
    mask = (torch.arange(5) < torch.tensor([[5], [4], [2], [3]])).to(device)
    fills = (math.nan, math.inf, 0, 7, label)
    dirty = [x.masked_fill(~mask, y) for x, y in zip(groups, fills, strict=True)]
    leaf = dirty[0].clone().requires_grad_()
    got = call(leaf, *dirty[1:], mask=mask, reduction="none")
    got.loss.sum().backward()
    assert not leaf.grad[~mask].any()
    assert torch.isfinite(leaf.grad).all()
    pairs = []
    for p, size in enumerate(mask.sum(1).tolist()):
        short = [x[p : p + 1, :size] for x in groups]
        want = call(*short, reduction="none")
        pairs.append(want.metrics.get("pairs", 1))
        if call is not CALLS["trpa"]:  # its terms are shares of the batch's
            torch.testing.assert_close(got.loss[p : p + 1], want.loss)
        torch.testing.assert_close(got.rewards[p : p + 1, :size], want.rewards)
    if call is CALLS["trpa"]:
        alone = [call(*(x[p : p + 1, :n] for x in groups)).loss for p, n in enumerate((5, 4, 2, 3))]
        share = torch.stack(pairs) / sum(pairs)
        torch.testing.assert_close(got.loss.mean(), (torch.stack(alone) * share).sum())


def test_groups_without_any_response(call, groups):
    policy, *rest = groups
    leaf = policy.clone().requires_grad_()
    out = call(leaf, *rest, mask=torch.zeros(4, 5).bool())
    out.loss.backward()
    assert out.loss == 0
    assert not leaf.grad.any()
    some = torch.tensor([True, False, True, False])[:, None].expand(4, 5)
    parts = call(leaf, *rest, mask=some, reduction="none").loss
    assert parts[1::2].tolist() == [0, 0]
    assert torch.isfinite(torch.autograd.grad(parts.sum(), leaf)[0]).all()


def test_responses_of_a_group_can_be_permuted(call, groups):
    order = torch.tensor([3, 0, 4, 2, 1])
    got, want = call(*(x[:, order] for x in groups)), call(*groups)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.rewards, want.rewards[:, order])


def test_whole_groups_of_equal_ranks_are_the_batch(call, groups):
    if call is CALLS["trpa"]:  # its mean is over pairs: equally many here, by the same levels
        groups = (*groups[:3], groups[3][:1].expand(4, 5), groups[4])
    halves = [call(*(x[part] for x in groups)).loss for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(torch.stack(halves).mean(), call(*groups).loss)


def test_no_host_synchronisation(call, groups):
    """Tensors without values: to read one on the host is an error."""
    policy, *rest = (x.to("meta") for x in groups)
    call(policy.requires_grad_(), *rest).loss.backward()
    assert policy.grad.shape == (4, 5)


def test_errors(groups):
    policy, ref, counts, levels, right = groups
    cases = [
        (r"trpa: policy: .*\[P, G\], got \[4\]", lambda: trpa(policy[:, 0], ref, counts, levels)),
        (r"disco: policy: .*got \[4, 0\]", lambda: disco(policy[:, :0], right[:, :0])),
        (r"trpa: levels: expected shape", lambda: trpa(policy, ref, counts, levels[:, :2])),
        ("trpa: anisotropy: .*positive", lambda: trpa(policy, ref, counts, levels, anisotropy=0)),
        (r"trpa: kl: .*0-d", lambda: trpa(policy, ref, counts, levels, kl=policy)),
        (r"disco: desirable: expected torch.bool \[4, 5\]", lambda: disco(policy, levels)),
        (r"discob: desirable: .*\[4, 5\]", lambda: discob(policy, right[:, :3])),
        ("disco: tau: .*positive finite", lambda: disco(policy, right, tau=math.inf)),
        ("disco: kl_max: .*>= 0", lambda: disco(policy, right, kl_max=-1.0)),
        ("discob: kl_weight: .*>= 0", lambda: discob(policy, right, kl_weight=-1.0)),
        (r"disco: mask: expected torch.bool", lambda: disco(policy, right, mask=policy)),
        ("gepo: ddof: expected 0 or 1, got 2", lambda: gepo(policy, ref, right, ddof=2)),
        ("gepo: variance_of: .*got 'q'", lambda: gepo(policy, ref, right, variance_of="q")),
        ("gepo: variance_weight", lambda: gepo(policy, ref, right, variance_weight=-1.0)),
    ]
    for message, function in cases:
        with pytest.raises(ValueError, match=message):
            function()
