"""Advantages of groups: what holds for every method, relations between them, and edge cases."""

from __future__ import annotations

import inspect
import math
import re

import pytest
import torch

from fastpo import advantages
from fastpo.groups import Groups

NAN = float("nan")
CENTRED = ("grpo", "dr_grpo", "rloo", "gpg", "bnpo", "gdpo", "mo_grpo", "dgpo", "passk_analytic",
           "weighted_sum_grpo")  # fmt: skip
# In the others a group of equals learns from the rest of the batch, or from virtual responses.
ZERO_ON_EQUALS = (*CENTRED, "opo", "passk_max")
SHIFT_INVARIANT = sorted(
    {*ZERO_ON_EQUALS, "reinforce_pp_baseline"} - {"gpg", "bnpo", "passk_analytic"}
)
LONE = ("grpo", "dr_grpo", "rloo", "gpg", "opo", "reinforce_pp_baseline")


def method(name):
    """The function of a method with the options it cannot do without, on rewards 0 and 1."""

    def call(rewards, groups=None, lengths=None, **options):
        function = getattr(advantages, name)
        if "reward_weights" in inspect.signature(function).parameters:
            rewards = torch.stack([rewards, 0.5 * rewards], -1)
        if name == "passk_analytic":
            options["k"] = 2
        if name in ("opo", "reinforce_pp_baseline", "dgpo"):
            options["lengths"] = torch.ones_like(rewards) if lengths is None else lengths
        if name == "gigpo":
            rows = torch.arange(len(rewards), device=rewards.device)
            options |= {"trajectories": rows, "anchors": rows // 3, "step_returns": rewards}
        return function(rewards, groups, **options)

    return call


@pytest.fixture
def binary(device):
    """Ragged: rewards 0 and 1 and ids; at least two in each group."""
    ids = torch.tensor([3, 0, 3, 1, 0, 1, 1, 3, 0, 3, 2, 2, 2], device=device)
    rewards = torch.tensor([1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1.0], dtype=torch.float64)
    lengths = torch.tensor([3, 5, 4, 8, 2, 2, 6, 6, 4, 1, 1, 2, 9], device=device)
    return rewards.to(device), ids, lengths


every = pytest.mark.parametrize("name", sorted(advantages.METHODS))
# The trajectories and anchors of gigpo lie by row number here.
of_any_order = pytest.mark.parametrize("name", sorted({*advantages.METHODS} - {"gigpo"}))


def test_every_method_is_called_here():
    for name, function in advantages.METHODS.items():
        required = [
            p.name
            for p in list(inspect.signature(function).parameters.values())[2:]
            if p.default is inspect.Parameter.empty
        ]
        rewards = torch.tensor([1.0, 0.0, 0.0])
        assert required == [] or method(name)(rewards, 3).shape == (3,)


@of_any_order
def test_order_of_rows_does_not_matter(name, binary):
    rewards, ids, lengths = binary
    if name == "passk_max":
        rewards = rewards + torch.rand(len(rewards), device=rewards.device)  # no ties
    got = method(name)(rewards, ids, lengths)
    order = torch.randperm(len(ids), device=ids.device)
    shuffled = method(name)(rewards[order], ids[order], lengths[order])
    torch.testing.assert_close(shuffled, got[order])
    torch.testing.assert_close(method(name)(rewards, ids * 31 - 50, lengths), got)


@of_any_order
def test_a_missing_reward_is_0_and_changes_nothing_else(name, binary):
    rewards, ids, lengths = binary
    more = torch.tensor([NAN, NAN], dtype=torch.float64, device=ids.device)
    new = torch.tensor([1, 7], device=ids.device)  # in a group, and a group of its own
    if name == "passk_max":
        new = torch.tensor([1, 2], device=ids.device)
    # The tokens of the batch that dgpo counts are all that the loss has.
    tokens = torch.full_like(new, 0 if name == "dgpo" else 50)
    long = torch.cat([lengths, tokens])
    got = method(name)(torch.cat([rewards, more]), torch.cat([ids, new]), long)
    assert (got[-2:] == 0).all()
    torch.testing.assert_close(got[:-2], method(name)(rewards, ids, lengths))
    nothing = method(name)(torch.full_like(rewards, NAN), ids, lengths)
    assert (nothing == 0).all()


@every
def test_squares_that_overflow_do_not_make_advantages_0(name):
    """They are those of float64, or the rewards are refused."""
    parameters = inspect.signature(getattr(advantages, name)).parameters
    options = [{"reward_range": (0.0, 4e20)} if name == "bnpo" else {}]
    options += [{"normalize": True}] if "normalize" in parameters else []
    options += [{"scale": s} for s in ("group", "batch") if "scale" in parameters]
    rewards = torch.tensor([0.0, 1e20, 2e20, 3e20, 1e20, 0.0])
    for chosen in options:
        try:
            want = method(name)(rewards.double(), 3, **chosen)
        except ValueError as error:
            refusal = str(error)  # of large rewards, or of a scale that the method has not
            with pytest.raises(ValueError, match=re.escape(refusal)):
                method(name)(rewards, 3, **chosen)
            continue
        got, refusal = None, ""
        try:
            got = method(name)(rewards, 3, **chosen)
        except ValueError as error:
            refusal = str(error)
        if got is None:
            assert "rewards: expected numbers whose squares are finite" in refusal
        else:
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@every
def test_no_rows(name, device):
    ids = torch.zeros(0, dtype=torch.int64, device=device)
    for groups in (3, ids):
        assert method(name)(torch.zeros(0, device=device), groups).shape == (0,)
    if name != "gigpo":  # it takes rows alone
        assert method(name)(torch.zeros(0, 4, device=device)).shape == (0, 4)


@every
def test_empty_groups_and_types(name, binary):
    rewards, ids, lengths = binary
    groups = Groups.from_ids(2 * ids + 1, num_groups=12)
    want = method(name)(rewards, ids, lengths)
    torch.testing.assert_close(method(name)(rewards, groups, lengths), want)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        narrow = rewards.to(dtype).requires_grad_()
        got = method(name)(narrow, ids, lengths)
        assert got.dtype == torch.float32
        assert not got.requires_grad
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ZERO_ON_EQUALS)
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equal_rewards_have_exactly_no_advantage(name, value, dtype, device):
    rewards = torch.tensor([[1, 0, 1], [value] * 3, [0, 0, 1]], dtype=dtype, device=device)
    if name in (
        "grpo",
        "dr_grpo",
        "rloo",
        "gpg",
        "dgpo",
        "opo",
        "gdpo",
        "mo_grpo",
        "weighted_sum_grpo",
    ):
        rewards[1] += 0.1  # no sum of three of it is exact
    lengths = torch.tensor([[1, 2, 3]] * 3, device=device)
    got = method(name)(rewards, lengths=lengths)
    assert (got[1] == 0).all()
    assert got[2].abs().max() > 0


@pytest.mark.parametrize("name", CENTRED)
def test_sum_over_a_group_is_0(name, binary):
    rewards, ids, lengths = binary
    got = method(name)(rewards, ids, lengths)
    sums = torch.zeros(4, dtype=torch.float64, device=ids.device).index_add(0, ids, got)
    assert sums.abs().max() < 1e-13


@pytest.mark.parametrize("name", SHIFT_INVARIANT)
def test_a_shift_of_all_rewards_does_not_matter(name, binary):
    rewards, ids, lengths = binary
    want = method(name)(rewards, ids, lengths)
    torch.testing.assert_close(method(name)(rewards + 3, ids, lengths), want)


@pytest.mark.parametrize(
    "call",
    [
        lambda r, ids: advantages.grpo(r, ids, eps=0.0),
        lambda r, ids: advantages.grpo(r, ids, eps=0.0, scale="batch", ddof=0),
        lambda r, ids: advantages.gdpo(torch.stack([r, r.square()], 1), ids, eps=0.0),
        lambda r, ids: advantages.dgpo(r, ids, eps=0.0, difficulty_weights=False),
        lambda r, ids: advantages.passk_max(r, ids, eps=0.0),
    ],
    ids=["grpo", "grpo-batch", "gdpo", "dgpo", "passk_max"],
)
def test_a_positive_factor_does_not_matter_without_eps(call, binary):
    rewards, ids, _ = binary
    rewards = rewards + torch.rand(len(rewards), device=ids.device)
    rewards[-3:] = 0.25  # a group of equals has no advantage, not NaN
    got = call(rewards, ids)
    torch.testing.assert_close(call(4 * rewards, ids), got)
    assert (got[-3:] == 0).all()


def test_who_sees_the_scale_of_one_component(device):
    rewards = torch.rand(6, 5, 2, dtype=torch.float64, device=device)
    scaled = rewards * torch.tensor([1.0, 10.0], device=device)
    for function in (advantages.gdpo, advantages.mo_grpo):
        torch.testing.assert_close(function(scaled, eps=0.0), function(rewards, eps=0.0))
    summed = advantages.weighted_sum_grpo
    assert (summed(scaled) - summed(rewards)).abs().max() > 0.1
    weighted = summed(rewards, reward_weights=[1.0, 10.0])
    torch.testing.assert_close(weighted, summed(scaled))


def test_mo_grpo_is_the_sum_of_grpo_of_each_component(device):
    rewards = torch.rand(6, 5, 3, dtype=torch.float64, device=device)
    rewards[2, 1, 0] = rewards[4, :, 1] = NAN
    weights = [1.0, 0.0, 2.5]
    parts = (w * advantages.grpo(rewards[..., k]) for k, w in enumerate(weights))
    torch.testing.assert_close(advantages.mo_grpo(rewards, reward_weights=weights), sum(parts))


# ------------------------------------------------------------------ one method is another


def test_relations(binary):
    rewards, ids, _ = binary
    rewards = rewards + torch.rand(len(rewards), device=ids.device)
    same = torch.full_like(ids, 7)
    counts = torch.bincount(ids)[ids]
    centred = advantages.dr_grpo(rewards, ids)
    close = torch.testing.assert_close
    close(advantages.rloo(rewards, ids), counts / (counts - 1) * centred)
    close(advantages.opo(rewards, ids, lengths=same), centred)
    close(advantages.grpo(rewards, ids, scale="none"), centred)
    close(advantages.gpg(rewards, ids), centred)  # no reward is 0
    verl = advantages.grpo(rewards, ids, convention="verl")
    close(advantages.grpo(rewards, ids, eps=1e-6), verl)
    close(advantages.grpo(rewards, ids, convention="verl_vectorized"), verl)
    close(advantages.ngrpo(rewards, ids, virtual_count=0), verl)
    rows = torch.arange(len(ids), device=ids.device)
    steps = {"trajectories": rows, "anchors": rows % 2, "step_returns": rewards.square()}
    close(advantages.gigpo(rewards, ids, step_weight=0.0, **steps), centred)
    scaled = advantages.gigpo(rewards, ids, step_weight=0.0, scale="group", **steps)
    close(scaled, verl)
    alone = steps | {"anchors": rows}
    close(advantages.gigpo(rewards, ids, step_weight=3.0, **alone), centred)


def test_gdpo_of_one_component_or_of_equal_ones_is_whitened_grpo(binary):
    rewards, ids, _ = binary
    rewards = rewards + torch.rand(len(rewards), device=ids.device)
    grpo = advantages.grpo(rewards, ids)
    want = (grpo - grpo.mean()) / (grpo.std() + 1e-4)
    assert abs(grpo.mean()) < 1e-15
    one = rewards[:, None]
    torch.testing.assert_close(advantages.gdpo(one, ids), want)
    torch.testing.assert_close(advantages.gdpo(one, ids, convention="nvlabs"), grpo)
    no_eps = lambda x: advantages.gdpo(x, ids, eps=0.0)
    torch.testing.assert_close(no_eps(torch.stack([rewards] * 3, 1)), no_eps(one))


def test_gdpo_conventions_treat_what_is_missing_in_their_way(device):
    rewards = torch.rand(2, 4, 2, dtype=torch.float64, device=device)
    rewards[0, 1, 0] = rewards[1, 2] = NAN
    zeros = rewards.nan_to_num()
    nvlabs = advantages.gdpo(rewards, convention="nvlabs")
    torch.testing.assert_close(nvlabs, advantages.gdpo(zeros))
    trl = advantages.gdpo(rewards)
    assert trl[1, 2] == 0
    assert nvlabs[1, 2] != 0


def test_gdpo_of_verl_is_whitened_over_the_tokens(device):
    rewards = torch.rand(3, 4, 2, dtype=torch.float64, device=device)
    lengths = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6], [5, 3, 5, 8]], device=device)
    got = advantages.gdpo(rewards, convention="verl", lengths=lengths)
    parts = [advantages.grpo(rewards[..., k], convention="verl") for k in range(2)]
    tokens = sum(parts).reshape(-1).repeat_interleave(lengths.reshape(-1))
    want = (sum(parts) - tokens.mean()) / (tokens.var() + 1e-8).sqrt()
    torch.testing.assert_close(got, want)
    missing = torch.full((3, 1, 2), NAN, dtype=torch.float64, device=device)
    more = torch.cat([rewards, missing], 1)
    longer = torch.cat([lengths, lengths[:, :1]], 1)
    again = advantages.gdpo(more, convention="verl", lengths=longer)
    torch.testing.assert_close(again[:, :4], want)
    assert (again[:, 4] == 0).all()


def test_reinforce_pp_baseline_is_the_whitening_of_tokens(device):
    rewards = torch.rand(3, 4, dtype=torch.float64, device=device)
    lengths = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6], [5, 3, 5, 8]], device=device)
    centred = advantages.dr_grpo(rewards)
    tokens = centred.reshape(-1).repeat_interleave(lengths.reshape(-1))
    assert abs(tokens.mean() - 0) > 1e-3
    want = (centred - tokens.mean()) / (tokens.var() + 1e-8).sqrt()
    torch.testing.assert_close(advantages.reinforce_pp_baseline(rewards, lengths=lengths), want)
    nothing = advantages.reinforce_pp_baseline(rewards, lengths=torch.zeros_like(lengths))
    assert (nothing == 0).all()


@pytest.mark.parametrize("right", [1, 3, 7])
def test_sums_of_absolute_advantages(right, device):
    rewards = (torch.arange(8, device=device) < right).double()[None]
    rate = right / 8
    grpo = advantages.grpo(rewards, ddof=0, eps=0.0).abs().sum().item()
    assert grpo == pytest.approx(2 * 8 * math.sqrt(rate * (1 - rate)), rel=1e-14)
    dgpo = advantages.dgpo(rewards, eps=0.0).abs().sum().item()
    assert dgpo == pytest.approx(8, rel=1e-14)


def test_dgpo_weights(binary):
    rewards, ids, lengths = binary
    plain = advantages.dgpo(rewards, ids, difficulty_weights=False)
    hot = advantages.dgpo(rewards, ids, temperature=math.inf)
    torch.testing.assert_close(hot, plain)
    torch.testing.assert_close(advantages.dgpo(rewards, ids, temperature=1e12), plain)
    ratio = (advantages.dgpo(rewards, ids) / plain).nan_to_num()
    each = torch.stack([ratio[ids == g].max() for g in range(4)])
    assert each[2] == 0  # of equals
    assert each.sum().item() == pytest.approx(3, rel=1e-12)
    assert each[3] < each[1]  # of the higher pass rate
    # A prompt nobody solves by the main reward counts as the easiest.
    main = torch.where(ids == 1, 0.0, rewards)
    easy = advantages.dgpo(rewards, ids, difficulty_rewards=main) / plain
    assert easy[ids == 1].max() < easy[ids == 3].max()
    nothing = advantages.dgpo(torch.ones_like(rewards), ids, lengths=lengths)
    assert (nothing == 0).all()


def test_dgpo_makes_means_of_ranks_one_mean_over_the_tokens_of_valid_groups(binary):
    rewards, ids, lengths = binary
    rank = (torch.arange(len(ids), device=ids.device) >= 6).long()
    rank_tokens = torch.stack([lengths[rank == r].sum() for r in range(2)])[rank]
    options = {"lengths": lengths, "rank_tokens": rank_tokens, "world_size": 2}
    losses = (
        advantages.dgpo(rewards, ids, **options) * lengths * (1 + torch.arange(len(ids))).to(ids)
    )
    got = sum(losses[rank == r].sum() / lengths[rank == r].sum() for r in range(2)) / 2
    plain = advantages.dgpo(rewards, ids)
    kept = ids != 2
    weights = (1 + torch.arange(len(ids))).to(ids)
    want = (plain * lengths * weights)[kept].sum() / lengths[kept].sum()
    torch.testing.assert_close(got, want)


def test_ngrpo_learns_from_the_all_wrong_and_not_from_the_all_right(device):
    for size in (2, 5, 9):
        wrong, right = torch.zeros(1, size, device=device), torch.ones(1, size, device=device)
        wrong, right = wrong.double(), right.double()
        torch.testing.assert_close(
            advantages.ngrpo(wrong, eps=0.0), wrong - 1 / math.sqrt(size + 1)
        )
        assert (advantages.ngrpo(right) == 0).all()
    rewards = torch.rand(3, 6, dtype=torch.float64, device=device)
    more = torch.cat([rewards, torch.full((3, 2), 0.9, device=device)], 1)
    want = (rewards - more.mean(1, keepdim=True)) / (more.std(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(advantages.ngrpo(rewards, virtual_count=2, max_reward=0.9), want)


@pytest.mark.parametrize(("size", "k"), [(2, 1), (2, 2), (8, 2), (8, 5), (33, 1), (33, 5)])
def test_passk_analytic_is_the_formula_of_binomials(size, k, device):
    rights = torch.arange(size + 1)
    rewards = (torch.arange(size) < rights[:, None]).double().to(device)
    got = advantages.passk_analytic(rewards, k=k, eps=0.0)
    total = math.comb(size, k)
    for right in range(1, size):
        wrong = size - right
        rate = 1 - math.comb(wrong, k) / total
        if rate == 1:
            assert (got[right] == 0).all()
            continue
        spread = math.sqrt(rate * (1 - rate))
        high = (1 - rate) / spread
        low = (1 - rate - math.comb(wrong - 1, k - 1) / math.comb(size - 1, k - 1)) / spread
        want = low + (high - low) * rewards[right]
        torch.testing.assert_close(got[right], want, rtol=1e-11, atol=1e-12)
    assert (got[[0, size]] == 0).all()
    if k == 1:
        torch.testing.assert_close(got, advantages.grpo(rewards, ddof=0, eps=0.0))
    large = torch.zeros(1, 20_000, device=device)
    large[0, :3] = 1
    assert advantages.passk_analytic(large, k=10_000)[0, 0].isfinite()


def test_bnpo_between_no_scaling_and_grpo(device):
    one = torch.tensor([[1, 0, 0.5, 1]], dtype=torch.float64, device=device)
    centred = advantages.dr_grpo(one)
    torch.testing.assert_close(advantages.bnpo(one), centred)
    equal = one.repeat(3, 1)  # the authors' code has NaN here
    torch.testing.assert_close(advantages.bnpo(equal), advantages.dr_grpo(equal))
    wide = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0.0]], device=device)  # variance >= m (1 - m)
    assert (advantages.bnpo(wide) == 0).all()
    rewards = [[1, 1, 0, 1], [0, 1, 0, 0], [1, 0, 1, 0.0]]
    rewards = torch.tensor(rewards, dtype=torch.float64, device=device)
    # Both parameters are 3/2, where the density is (8 / pi) sqrt(p (1 - p)).
    grpo = advantages.grpo(rewards, ddof=0, eps=0.0)
    torch.testing.assert_close(advantages.bnpo(rewards), math.pi / 8 * grpo)
    mapped = advantages.bnpo(4 * rewards - 1, reward_range=(-1.0, 3.0))
    torch.testing.assert_close(mapped, advantages.bnpo(rewards))


def test_bnpo_of_rates_that_are_nearly_alike(device):
    values = torch.tensor([0.1, 0.2, 0.7, 0.35], dtype=torch.float64, device=device)
    orders = [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]]
    rewards = torch.stack([values[order] for order in orders])
    assert rewards.mean(1).unique().numel() > 1  # by the rounding of the sums
    torch.testing.assert_close(advantages.bnpo(rewards), advantages.dr_grpo(rewards))
    for gap in (1e-4, 1e-6, 1e-8, 1e-10, 1e-12):
        # The Beta distribution of few alike rates is narrow, and normal.
        rates = torch.tensor([0.5, 0.5 + gap], dtype=torch.float64, device=device)
        got = advantages.bnpo(torch.stack([rates - 0.1, rates + 0.1], 1))[0, 1].item() / 0.1
        normal = math.sqrt(3 * math.pi * gap**2) * math.exp(1 / 12)
        assert got == pytest.approx(normal, rel=1e-3) if gap > 1e-5 else 0 <= got < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bnpo_takes_rounded_ends_of_its_range(dtype, device):
    rewards = torch.tensor([[-0.3] * 3, [0.7] * 3, [0.7, -0.3, -0.3]], dtype=dtype, device=device)
    got = advantages.bnpo(rewards, reward_range=(-0.3, 0.7))
    assert got.isfinite().all()
    assert (got[:2] == 0).all()


# ------------------------------------------------------------------ groups of one


@pytest.mark.parametrize("name", LONE)
def test_a_group_of_one_by_rule(name, device):
    rewards = torch.tensor([0.75, 1.0, 0.0], dtype=torch.float64, device=device)
    ids = torch.tensor([5, 2, 2], device=device)
    zero = method(name)(rewards, ids, singleton="zero")
    kept = method(name)(rewards, ids, singleton="reward")
    if name == "reinforce_pp_baseline":
        centred = torch.tensor([0.75, 0.5, -0.5], dtype=torch.float64, device=device)
        want = (centred - centred.mean()) / (centred.var() + 1e-8).sqrt()
        torch.testing.assert_close(kept, want)
        torch.testing.assert_close(zero[0], torch.zeros_like(zero[0]))
        return
    assert zero[0] == 0
    scale = {"grpo": 1 / (1 + 1e-4), "gpg": 3 / 2}.get(name, 1.0)
    assert kept[0].item() == pytest.approx(0.75 * scale, rel=1e-15)
    assert torch.equal(zero[1:], kept[1:])


def test_a_group_of_one_by_convention(device):
    rewards = torch.tensor([[0.75]], dtype=torch.float64, device=device)
    value = lambda x: x.item()
    assert value(advantages.grpo(rewards)) == 0
    assert value(advantages.grpo(rewards, scale="batch")) == 0
    for convention in ("verl", "verl_vectorized"):
        assert value(advantages.grpo(rewards, convention=convention)) == 0.75 / (1 + 1e-6)
        assert value(advantages.grpo(rewards, convention=convention, scale="none")) == 0.75
        assert value(advantages.grpo(rewards, convention=convention, singleton="zero")) == 0
    assert value(advantages.dr_grpo(rewards)) == 0
    assert value(advantages.rloo(rewards)) == 0
    assert value(advantages.gpg(rewards)) == 0.75
    assert value(advantages.opo(rewards, lengths=torch.full_like(rewards, 3))) == 0.75
    assert value(advantages.ngrpo(rewards)) == 0.75 / (1 + 1e-6)
    assert value(advantages.bnpo(rewards)) == 0.75
    assert value(advantages.dgpo(rewards)) == 0
    assert value(advantages.gdpo(rewards[..., None])) == 0


def test_verl_vectorised_bounds_the_standard_deviation(device):
    rewards = torch.tensor([[0.5, 0.5 + 1e-5]], dtype=torch.float64, device=device)
    got = advantages.grpo(rewards, convention="verl_vectorized")
    torch.testing.assert_close(got[0, 1].item(), 5e-6 / (1e-3 + 1e-6), rtol=1e-9, atol=0)
    assert advantages.grpo(rewards, convention="verl")[0, 1] > 0.5


def test_opo_without_tokens_has_the_mean(device):
    rewards = torch.tensor([[1.0, 0.0], [1.0, 0.0]], device=device)
    lengths = torch.tensor([[0, 0], [0, 2]], device=device)
    got = advantages.opo(rewards, lengths=lengths)
    assert got.tolist() == [[0.5, -0.5], [1.0, 0.0]]


def test_an_infinite_reward_stays_in_its_group(device):
    rewards = torch.tensor([[1.0, 0.0], [torch.inf, 0.0]], device=device)
    got = advantages.grpo(rewards)
    assert got[0].isfinite().all()
    assert not got[1].isfinite().any()


def test_gigpo_counts_a_trajectory_once(device):
    rewards = torch.tensor([1, 1, 1, 1, 0.0], dtype=torch.float64, device=device)
    tries = torch.tensor([4, 4, 4, 4, 2], device=device)
    got = advantages.gigpo(
        rewards, 5, trajectories=tries, anchors=tries, step_returns=rewards, step_weight=0.0
    )
    assert got.tolist() == [0.5, 0.5, 0.5, 0.5, -0.5]
    missing = torch.tensor([1, 1, 1, 1, NAN], dtype=torch.float64, device=device)
    alone = {"trajectories": tries, "anchors": tries, "step_returns": rewards, "step_weight": 0.0}
    assert advantages.gigpo(missing, 5, **alone).tolist() == [1, 1, 1, 1, 0]
    assert advantages.gigpo(missing, 5, singleton="zero", **alone).tolist() == [0] * 5


def test_gigpo_does_not_see_the_order_of_its_rows(device):
    rows = 40
    draw = lambda high: torch.randint(high, (rows,), device=device)
    trajectories, anchors = draw(12), draw(3)
    groups = trajectories // 3 * 100
    rewards = torch.rand(12, dtype=torch.float64, device=device)[trajectories]
    rows_of = {
        "trajectories": trajectories,
        "anchors": anchors,
        "step_returns": torch.rand(rows, dtype=torch.float64, device=device),
    }
    got = advantages.gigpo(rewards, groups, scale="group", **rows_of)
    order = torch.randperm(rows, device=device)
    shuffled = {name: x[order] for name, x in rows_of.items()}
    again = advantages.gigpo(rewards[order], groups[order], scale="group", **shuffled)
    torch.testing.assert_close(again, got[order])
    ready = {name: Groups.from_ids(rows_of[name]) for name in ("trajectories", "anchors")}
    assert torch.equal(advantages.gigpo(rewards, groups, scale="group", **rows_of | ready), got)
    # A trajectory's steps count once in the episode part, each for itself in the step part.
    plain = advantages.gigpo(rewards, groups, step_weight=0.0, **rows_of)
    for g in groups.unique():
        mine = groups == g
        each = torch.stack([rewards[trajectories == t][0] for t in trajectories[mine].unique()])
        if len(each) > 1:
            torch.testing.assert_close(plain[mine], rewards[mine] - each.mean())
        for a in range(3):
            same = mine & (anchors == a)
            step = (advantages.gigpo(rewards, groups, **rows_of) - plain)[same]
            want = rows_of["step_returns"][same]
            torch.testing.assert_close(step, want - want.mean())


@pytest.mark.parametrize("name", ["opo", "reinforce_pp_baseline", "dgpo"])
def test_lengths_of_any_type(name, binary):
    rewards, ids, lengths = binary
    want = method(name)(rewards.float(), ids, lengths)
    for dtype in (torch.float64, torch.int32, torch.float16):
        got = method(name)(rewards.float(), ids, lengths.to(dtype))
        torch.testing.assert_close(got.float(), want)
    columns = torch.stack([rewards, rewards + 1], 1)
    assert torch.equal(method(name)(columns[:, 0], ids), method(name)(rewards, ids))
