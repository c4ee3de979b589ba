"""Published vectors and properties of the losses over lists."""

from __future__ import annotations

import math

import pytest
import torch

from fastpo.losses import adpo, adpo_adaptive_tau, dpo, gpo, gpo_scores, pl_dpo, pro, tpo_tree

F64 = torch.float64


@pytest.fixture
def lists():
    """Four prompts with five responses each: sums, reference sums, counts and scores."""
    generator = torch.Generator().manual_seed(0)
    policy, ref = -10 * torch.rand(2, 4, 5, dtype=F64, generator=generator)
    counts = torch.randint(1, 9, (4, 5), generator=generator)
    return policy, ref, counts, torch.randn(4, 5, dtype=F64, generator=generator)


CALLS = {
    "pro": lambda policy, ref, counts, scores, **o: pro(policy, counts, scores, **o),
    "pl_dpo": lambda policy, ref, counts, scores, **o: pl_dpo(policy, ref, scores, **o),
    "adpo": lambda policy, ref, counts, scores, **o: adpo(policy, ref, scores, kl_weight=0.1, **o),
    "adpo_tau": lambda policy, ref, counts, scores, **o: adpo(
        policy, ref, scores, tau=adpo_adaptive_tau(
            policy, counts, scores, 100, mask=o.get("mask")), **o),
    "gpo": lambda policy, ref, counts, scores, **o: gpo(policy, ref, scores, beta=0.5, **o),
    "tpo_tree": lambda policy, ref, counts, scores, **o: tpo_tree(policy, ref, scores, **o),
}  # fmt: skip


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


def test_pro_vector(check_vector, vector_dtype):
    means, counts = torch.tensor([[-0.8, -1.0, -1.4]], dtype=vector_dtype), torch.full((1, 3), 3)
    scores = torch.tensor([[2.0, 1.2, 0.3]], dtype=vector_dtype)
    check_vector(pro(means * counts, counts, scores).loss, 2.1442906296)
    check_vector(
        pro(means * counts, counts, scores, sft_weight=0.0).loss, 1.1350301804 + 0.5292604492
    )
    # The second term alone, as a list of the two worse responses.
    worse = pro((means * counts)[:, 1:], counts[:, 1:], scores[:, 1:], sft_weight=0.0)
    check_vector(worse.loss, 0.5292604492)


def test_pl_dpo_vector(check_vector, vector_dtype):
    policy = torch.tensor([[0.4, 0.1, -0.3]], dtype=vector_dtype)
    out = pl_dpo(policy, torch.zeros_like(policy), torch.tensor([[3.0, 2.0, 1.0]]), beta=0.5)
    check_vector(out.loss, 1.5402517478)
    check_vector(out.rewards, [[0.2, 0.05, -0.15]])


def test_adpo_vector(check_vector, vector_dtype):
    policy = torch.tensor([[0.3, -0.2, 0.1, -0.4]], dtype=vector_dtype)
    scores = torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=vector_dtype)
    check_vector(adpo(policy, torch.zeros_like(policy), scores).loss, 1.4421400982)
    # The target is minus the gradient in l, plus the softmax.
    policy.requires_grad_()
    adpo(policy, torch.zeros_like(policy), scores, tau=1.0).loss.backward()
    target = policy.detach().softmax(1) - policy.grad
    check_vector(target, [[0.4848244540, 0.0151755460, 0.0151755460, 0.4848244540]])


def test_gpo_vector(check_vector, vector_dtype):
    table = torch.zeros(3, 3, dtype=vector_dtype)
    table[0, 1], table[0, 2], table[1, 2] = 0.6, -0.2, 0.4
    scores = gpo_scores((table - table.T)[None])
    check_vector(scores, [[0.1333333333, -0.0666666667, -0.0666666667]])
    policy = torch.tensor([[0.2, -0.1, -0.4]], dtype=vector_dtype)
    check_vector(gpo(policy, torch.zeros_like(policy), scores, beta=0.5).loss, 0.0255555556)
    # The terms one by one, as lists of one.
    one_by_one = gpo(policy.T, torch.zeros_like(policy.T), scores.T, beta=0.5, reduction="none")
    check_vector(one_by_one.loss, [0.0044444444, 0.0011111111, 0.0711111111])


def test_tpo_tree_vector(check_vector, vector_dtype):
    policy = torch.tensor([[0.4, 0.1, -0.3, 0.2]], dtype=vector_dtype)
    scores = torch.tensor([[1.0, 0.6, 0.0, 0.3]], dtype=vector_dtype)
    check_vector(tpo_tree(policy, torch.zeros_like(policy), scores, beta=1.0).loss, 0.8678169773)


def test_pl_dpo_of_two_is_dpo(f1):
    policy, ref = torch.stack(f1.sums[:2], 1), torch.stack(f1.sums[2:], 1)
    got = pl_dpo(policy, ref, torch.tensor([[1.0, 0.0]]).expand(3, 2), beta=0.5, reduction="none")
    want = dpo(*f1.sums, beta=0.5, reduction="none")
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.rewards, torch.stack(want[1:3], 1))


def test_adpo_of_two_with_a_hard_target_is_dpo(f1):
    policy, ref = torch.stack(f1.sums[:2], 1), torch.stack(f1.sums[2:], 1)
    # z = +-0.7 over 1e-3: the smaller share is exp(-1414), which is 0.
    scores = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    got = adpo(policy, ref, scores, tau=2.0, beta_r=1e-3, reduction="none").loss
    torch.testing.assert_close(got, dpo(*f1.sums, beta=0.5, reduction="none").loss)


def test_pro_with_equal_gaps_is_plackett_luce(lists):
    """Gaps of 1 in lists of two."""
    policy, _, counts, _ = (x[:, :2] for x in lists)
    scores = torch.tensor([[2.0, 1.0]]).expand(4, 2)
    got = pro(policy, counts, scores, sft_weight=0.0).loss
    means = policy / counts
    torch.testing.assert_close(got, pl_dpo(means, 0 * means, scores, beta=1.0).loss)


def test_pro_ties_are_constants(lists):
    policy, _, counts, _ = lists
    policy = policy.requires_grad_()
    out = pro(policy, counts, torch.zeros(4, 5), sft_weight=0.0)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(sum(math.log(n) for n in (5, 4, 3, 2, 1)))
    assert not policy.grad.any()


def test_pro_likelihood_grows_with_the_list(lists):
    policy, _, counts, scores = lists
    mask = torch.arange(5) < torch.tensor([[5], [3], [2], [1]])
    options = dict(mask=mask, reduction="none")
    term = pro(policy, counts, scores, **options).loss
    term = term - pro(policy, counts, scores, sft_weight=0.0, **options).loss
    best = policy.gather(1, scores.masked_fill(~mask, -math.inf).argmax(1, keepdim=True))[:, 0]
    torch.testing.assert_close(term, -0.05 * torch.tensor([16.0, 4.0, 1.0, 0.0]) * best)


def test_adpo_equal_scores_pull_to_the_anchor():
    ref = torch.tensor([[-1.0, -2.0, -3.0]], dtype=F64)
    policy = (ref + 5).requires_grad_()
    loss = adpo(policy, ref, torch.ones(1, 3)).loss
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3))
    assert policy.grad.abs().max() < 1e-15
    assert adpo(ref + torch.tensor([1.0, 0.0, 0.0]), ref, torch.ones(1, 3)).loss > math.log(3)


def test_adpo_takes_rewards_and_advantages_alike(lists):
    policy, ref, _, scores = lists
    got = adpo(policy, ref, 3 * scores - 2).loss
    # The two differ by the 1e-8 next to a standard deviation of order 1.
    torch.testing.assert_close(got, adpo(policy, ref, scores).loss, rtol=1e-7, atol=0)


def test_adpo_drops_groups_without_reward(lists):
    policy, ref, _, scores = lists
    scores = scores.abs() * torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    options = dict(drop_unrewarded=True)
    rest = adpo(policy[::2], ref[::2], scores[::2], reduction="none").loss
    out = adpo(policy, ref, scores, **options)
    torch.testing.assert_close(out.loss, rest.mean())
    assert out.metrics["kept"].tolist() == [True, False, True, False]
    parts = adpo(policy, ref, scores, reduction="none", **options).loss
    assert parts[1::2].tolist() == [0, 0]
    torch.testing.assert_close(parts[::2], rest)
    total = adpo(policy, ref, scores, reduction="sum", **options).loss
    torch.testing.assert_close(total, rest.sum())
    assert adpo(policy, ref, -scores.abs(), **options).loss == 0


def test_adpo_kl_is_the_k3_estimate(lists):
    policy, ref, _, scores = lists
    got = adpo(policy, ref, scores, kl_weight=0.3).loss - adpo(policy, ref, scores).loss
    gap = ref - policy
    torch.testing.assert_close(got, 0.3 * (gap.exp() - 1 - gap).mean())
    at_anchor = adpo(ref, ref, scores, kl_weight=0.3).loss
    torch.testing.assert_close(at_anchor, adpo(ref, ref, scores).loss)


def test_adpo_kl_never_pushes_away():
    """Beyond the largest exponent it is held: its gradient ends, it does not change sign."""
    policy = torch.tensor([[-79.0, 0.0], [-81.0, 0.0], [-1e4, 0.0]], requires_grad=True)
    scores = torch.ones(3, 2)
    without, with_kl = (
        adpo(policy, torch.zeros(3, 2), scores, kl_weight=weight, reduction="sum").loss
        for weight in (0.0, 1.0)
    )
    (grad,) = torch.autograd.grad(with_kl - without, policy)
    assert grad[0, 0] < 0
    assert (grad[1:] == 0).all()


def test_adaptive_tau_by_hand():
    policy, counts = (
        torch.tensor([[-4.0, -8.0], [-0.0, -0.0], [-90.0, -90.0]]),
        torch.ones(3, 2) * 3,
    )
    scores = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    got = adpo_adaptive_tau(policy, counts, scores, vocabulary=100)
    unsure = 2.0 / math.log(100)
    want = [0.8 * (1 + 0.5 * unsure + 0.5 * (1 - unsure) * 0.5), 0.8, 0.8 * 1.5]
    torch.testing.assert_close(got, torch.tensor(want))
    # Groups of equal reward stand in the middle.
    flat = adpo_adaptive_tau(torch.zeros(2, 2), counts[:2], torch.ones(2, 2), vocabulary=100)
    torch.testing.assert_close(flat, torch.full((2,), 0.8 * 1.25))
    bounded = adpo_adaptive_tau(policy, counts, scores, vocabulary=100, low=0.9, high=1.0)
    assert bounded.min() == torch.tensor(0.9)
    assert bounded.max() == 1
    assert adpo_adaptive_tau(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0, 2), 9).shape == (
        0,
    )


def test_adaptive_tau_has_no_gradient(lists):
    policy, ref, counts, scores = lists
    tau = adpo_adaptive_tau(policy.requires_grad_(), counts, scores.requires_grad_(), 100)
    assert not tau.requires_grad
    leaf = tau.clone().requires_grad_()
    adpo(policy, ref, scores, tau=leaf).loss.backward()
    assert leaf.grad is None
    assert scores.grad is None


def test_one_tau_per_group_is_one_call_per_group(lists):
    policy, ref, _, scores = lists
    tau = torch.tensor([0.1, 0.5, 1.0, 4.0], dtype=F64)
    got = adpo(policy, ref, scores, tau=tau, reduction="none").loss
    for i in range(4):
        alone = adpo(policy[i : i + 1], ref[i : i + 1], scores[i : i + 1], tau=tau[i].item()).loss
        torch.testing.assert_close(got[i], alone)


def test_tpo_tree_weights_have_no_gradient_and_ties_make_no_pair(lists):
    policy, ref, _, scores = lists
    policy.requires_grad_()
    assert tpo_tree(policy, ref, torch.ones(4, 5)).loss == 0
    leaf = scores.clone().requires_grad_()
    tpo_tree(policy, ref, leaf).loss.backward()
    assert leaf.grad is None
    # Every pair pushes the better one up by as much as the worse one down.
    assert policy.grad.sum(1).abs().max() < 1e-15


def test_padding_may_hold_anything(call, lists):
    """Ragged lists against the same ones cut to their length, NaN and infinities at padding."""
    mask = torch.arange(5) < torch.tensor([[5], [3], [2], [4]])
    dirty = [torch.where(mask, x, math.nan if x.is_floating_point() else 0) for x in lists]
    leaf = dirty[0].clone().requires_grad_()
    got = call(leaf, *dirty[1:], mask=mask, reduction="none")
    got.loss.sum().backward()
    assert torch.isfinite(got.loss).all()
    assert torch.equal(leaf.grad[~mask], torch.zeros(6, dtype=F64))
    if call is CALLS["adpo_tau"]:  # its reward scale is the batch's
        return
    for i, length in enumerate(mask.sum(1).tolist()):
        short = [x[i : i + 1, :length] for x in lists]
        want = call(*short, reduction="none")
        torch.testing.assert_close(got.loss[i : i + 1], want.loss)
        torch.testing.assert_close(got.rewards[i : i + 1, :length], want.rewards)


def test_lists_without_response_are_zero(call, lists):
    mask = torch.tensor([[True] * 5, [False] * 5, [True] * 5, [False] * 5])
    leaf = lists[0].clone().requires_grad_()
    out = call(leaf, *lists[1:], mask=mask, reduction="none")
    out.loss.sum().backward()
    assert out.loss[1::2].tolist() == [0, 0]
    assert torch.isfinite(leaf.grad).all()


def test_responses_can_be_permuted(call, lists):
    order = torch.tensor([3, 0, 4, 2, 1])
    got, want = call(*(x[:, order] for x in lists)), call(*lists)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.rewards, want.rewards[:, order])


def test_gradients_of_longer_lists(call, lists):
    policy, *rest = lists
    if call is CALLS["adpo_tau"]:  # tau is held constant: its share of the derivative is left out
        return
    mask = torch.arange(5) < torch.tensor([[5], [3], [1], [4]])
    policy = (policy / 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: call(p, *rest, mask=mask).loss, policy)


def test_scores_and_reference_get_no_gradient(call, lists):
    policy, ref, counts, scores = (x.clone().requires_grad_(x.is_floating_point()) for x in lists)
    call(policy, ref, counts, scores).loss.backward()
    assert policy.grad is not None
    assert ref.grad is None
    assert scores.grad is None


def test_errors(lists):
    policy, ref, counts, scores = lists
    with pytest.raises(ValueError, match=r"pro: policy: expected .*\[B, K\], got \[4\]"):
        pro(policy[:, 0], counts, scores)
    with pytest.raises(ValueError, match=r"gpo: policy: expected .*\[B, K\], got \[4, 0\]"):
        gpo(policy[:, :0], ref[:, :0], scores[:, :0])
    with pytest.raises(ValueError, match=r"pl_dpo: scores: expected shape \[4, 5\] as policy"):
        pl_dpo(policy, ref, scores[:, :4])
    with pytest.raises(ValueError, match=r"adpo: mask: expected torch.bool \[4, 5\]"):
        adpo(policy, ref, scores, mask=torch.ones(4, 5))
    with pytest.raises(ValueError, match=r"adpo: tau: expected shape \[4\]"):
        adpo(policy, ref, scores, tau=torch.ones(4, 1))
    with pytest.raises(ValueError, match=r"adpo: tau: expected a positive"):
        adpo(policy, ref, scores, tau=0.0)
    with pytest.raises(ValueError, match=r"adpo_adaptive_tau: vocabulary: expected at least 2"):
        adpo_adaptive_tau(policy, counts, scores, 1)
    with pytest.raises(ValueError, match=r"adpo_adaptive_tau: low, high"):
        adpo_adaptive_tau(policy, counts, scores, 10, low=2.0, high=1.0)
    with pytest.raises(ValueError, match=r"gpo_scores: table: expected \[B, K, K\]"):
        gpo_scores(policy)
