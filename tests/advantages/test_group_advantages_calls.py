"""group_advantages by name, errors of all methods, compilation, and parity with TRL's lines."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

import fastpo
from fastpo import advantages, backends
from fastpo.advantages import group_advantages
from fastpo.groups import Groups

NAN = float("nan")
REWARDS = [[1.0, 0.0, 0.5, 0.2], [0.3] * 4]


def test_every_public_method_can_be_called_by_name():
    rewards = torch.rand(3, 4).round()
    assert fastpo.group_advantages is group_advantages
    for name, function in advantages.METHODS.items():
        assert getattr(advantages, name) is function
        taken = inspect.signature(function).parameters
        if "reward_weights" in taken or name == "gigpo":
            continue
        options = {"passk_analytic": {"k": 2}}.get(name, {})
        if name in ("opo", "reinforce_pp_baseline"):
            options["lengths"] = torch.ones(3, 4)
        got = group_advantages(rewards, method=name, **options)
        assert torch.equal(got, function(rewards, **options))
    assert torch.equal(group_advantages(rewards), advantages.grpo(rewards))


def test_several_rewards_by_name():
    rewards = torch.rand(12, 2, dtype=torch.float64)
    rewards[3, 0] = rewards[5] = NAN
    weights = torch.tensor([1.0, 2.0])
    total = advantages.sum_rewards(rewards, weights)
    assert total[3] == 2 * rewards[3, 1]
    assert total[5].isnan()
    options = {"reward_weights": weights}
    for name in ("grpo", "weighted_sum_grpo"):
        got = group_advantages(rewards, 4, name, **options)
        assert torch.equal(got, advantages.grpo(total, 4))
        by_prompt = group_advantages(rewards.reshape(3, 4, 2), method=name, **options)
        assert torch.equal(by_prompt.reshape(-1), got)
    for name in ("gdpo", "mo_grpo"):
        got = group_advantages(rewards, 4, name, **options)
        assert torch.equal(got, getattr(advantages, name)(rewards, 4, **options))
    assert torch.equal(
        group_advantages(rewards.nan_to_num(), 4, "rloo"),
        advantages.rloo(rewards.nan_to_num().sum(1), 4),
    )


# ------------------------------------------------------------------ as TRL has it


def trl_advantages(rewards, weights, size, scale_rewards, aggregation):
    """The formulas of TRL's GRPOTrainer, on rewards [N, K]."""
    from trl.trainer.utils import nanstd

    is_missing = rewards.isnan().all(1)
    if aggregation == "sum_then_normalize":
        total = (rewards * weights).nansum(1).masked_fill(is_missing, NAN)
        groups = total.view(-1, size)
        centred = total - groups.nanmean(1).repeat_interleave(size)
        if scale_rewards == "none":
            return centred.nan_to_num(nan=0.0)
        std = nanstd(total)
        if scale_rewards == "group":
            std = nanstd(groups, dim=1).repeat_interleave(size)
        return (centred / (std + 1e-4)).nan_to_num(nan=0.0)
    groups = rewards.view(-1, size, rewards.shape[1])
    normed = (groups - groups.nanmean(1, keepdim=True)) / (nanstd(groups, 1, keepdim=True) + 1e-4)
    total = (normed.flatten(0, 1) * weights).nansum(1).masked_fill(is_missing, NAN)
    return ((total - total.nanmean()) / (nanstd(total) + 1e-4)).nan_to_num(nan=0.0)


@pytest.mark.parametrize(
    "options",
    [
        ("grpo", "group", "sum_then_normalize"),
        ("grpo", "batch", "sum_then_normalize"),
        ("grpo", "none", "sum_then_normalize"),
        ("gdpo", "group", "normalize_then_sum"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("components", [1, 3])
def test_agrees_with_trl(options, components, device):
    pytest.importorskip("trl")
    method, scale, aggregation = options
    rewards = torch.randn(24, components, dtype=torch.float64, device=device)
    rewards[rewards > 1.2] = NAN
    rewards[3] = rewards[8:11] = rewards[16:20] = NAN  # of group 2 one is left, of 4 none
    rewards[20:] = 0.1
    weights = torch.linspace(0.5, 2, components, dtype=torch.float64, device=device)
    want = trl_advantages(rewards, weights, 4, scale, aggregation)
    extra = {"scale": scale} if method == "grpo" else {}
    got = group_advantages(rewards, 4, method, reward_weights=weights, **extra)
    # TRL takes n / (n - 1) of its standard deviations in float32.
    torch.testing.assert_close(got, want, rtol=torch.finfo(torch.float32).eps, atol=1e-12)
    assert (got[20:] == 0).all()


# ------------------------------------------------------------------ compiled


@pytest.mark.parametrize("method", ["grpo", "rloo", "dgpo", "bnpo", "passk_max", "passk_analytic"])
def test_compiles_to_one_graph(method, device):
    rewards = torch.rand(5, 4, device=device).round()
    options = {
        "rloo": {"kl": 0.1 * rewards, "normalize": True},
        "dgpo": {"lengths": torch.ones(5, 4, device=device)},
        "passk_analytic": {"k": 2},
    }.get(method, {})
    call = lambda x: group_advantages(x, method=method, **options)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rewards), call(rewards))


# ------------------------------------------------------------------ errors

FLAT = torch.tensor([1.0, 0.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda x: group_advantages(x, method="grppo"),
            "group_advantages: method: expected one of bnpo, dgpo, .*rloo, .*got 'grppo'",
        ),
        (
            lambda x: group_advantages(x, method="rloo", epsilon=1.0),
            "options of rloo: expected of kl, beta, reward_range, .* got 'epsilon'",
        ),
        (
            lambda x: group_advantages(x, method="opo"),
            "group_advantages: lengths: expected given for opo, got none",
        ),
        (
            lambda x: group_advantages(x, reward_weights=[1.0]),
            r"reward_weights: expected rewards \[..., K\], got rewards \[2, 4\]",
        ),
        (
            lambda x: group_advantages(x[..., None], reward_weights=[1.0, 2.0]),
            r"reward_weights: expected \[K\], K = 1, got \[2\]",
        ),
        (
            lambda x: advantages.grpo(FLAT),
            r"grpo: rewards: expected \[P, G\] without groups or \[N\] with, got \[4\]",
        ),
        (lambda x: advantages.grpo(x, 4), r"grpo: rewards: expected .*, got \[2, 4\]"),
        (lambda x: advantages.grpo(x.long()), "grpo: rewards: expected floats, got torch.int64"),
        (lambda x: advantages.grpo(FLAT, 3), "size: expected a divisor of the 4 rows, > 0, got 3"),
        (lambda x: advantages.grpo(FLAT, FLAT), "ids: expected int32 or int64"),
        (lambda x: advantages.grpo(FLAT, torch.arange(5)), "groups: expected 4 rows, got 5"),
        (lambda x: advantages.grpo(x, scale="std"), "scale: expected 'group', 'batch', 'none'"),
        (lambda x: advantages.grpo(x, convention="v"), "convention: expected 'trl', 'verl'"),
        (lambda x: advantages.grpo(x, eps=-1.0), "eps: expected a finite number >= 0, got -1.0"),
        (lambda x: advantages.grpo(x, ddof=2), "ddof: expected 0, 1, got 2"),
        (lambda x: advantages.grpo(x, singleton="one"), "singleton: expected 'zero', 'reward'"),
        (lambda x: advantages.rloo(x, kl=x[:1]), r"rloo: kl: expected \[2, 4\].* got \[1, 4\]"),
        (lambda x: advantages.rloo(x, beta=-1.0), "rloo: beta: expected a finite number >= 0"),
        (
            lambda x: advantages.rloo(x, reward_range=(1.0, -1.0)),
            r"rloo: reward_range: expected lowest, highest, got \(1.0, -1.0\)",
        ),
        (lambda x: advantages.gpg(x, f_norm=0.0), "f_norm: expected a finite number > 0"),
        (lambda x: advantages.opo(x, lengths=FLAT), r"lengths: expected \[2, 4\] .* got \[4\]"),
        (lambda x: advantages.passk_max(FLAT, 1), "at least two rows in each, got one"),
        (
            lambda x: advantages.passk_max(FLAT, torch.tensor([0, 0, 1, 2])),
            "at least two rows in each, got one",
        ),
        (lambda x: advantages.passk_analytic(x, k=2), "rewards: expected 0 or 1, got others"),
        (lambda x: advantages.passk_analytic(FLAT, 4, k=0), "k: expected a finite number >= 1"),
        (
            lambda x: advantages.passk_analytic(FLAT, 2, k=3),
            "groups: expected at least k = 3 rewards in each, got fewer",
        ),
        (lambda x: advantages.bnpo(x - 1), r"bnpo: rewards: expected means in \(0.0, 1.0\)"),
        (lambda x: advantages.bnpo(x, reward_range=(1.0, 1.0)), "expected lowest < highest"),
        (lambda x: advantages.gdpo(x), r"gdpo: rewards: expected \[P, G, K\] without .*\[2, 4\]"),
        (lambda x: advantages.mo_grpo(FLAT, 2), r"mo_grpo: rewards: .*\[N, K\] with, got \[4\]"),
        (lambda x: advantages.gdpo(x, 2, convention="nemo"), "expected 'trl', 'nvlabs', 'verl'"),
        (lambda x: advantages.gdpo(x, 2, convention="verl"), "got 'verl' without lengths"),
        (lambda x: advantages.gdpo(x, 2, lengths=FLAT[:2]), "got 'trl' with lengths"),
        (lambda x: advantages.sum_rewards(x, [1.0]), r"expected \[K\], K = 4, got \[1\]"),
        (lambda x: advantages.dgpo(x, temperature=0.0), "temperature: expected a number > 0"),
        (lambda x: advantages.dgpo(x, world_size=2), "rank_tokens: expected given with world_size"),
        (lambda x: advantages.dgpo(x, rank_tokens=x), "lengths: expected tokens, as rank_tokens"),
        (lambda x: advantages.ngrpo(x, virtual_count=-1), "virtual_count: expected .* >= 0"),
        (
            lambda x: advantages.gigpo(
                FLAT, 2, trajectories=torch.arange(3), anchors=2, step_returns=FLAT
            ),
            "groups: expected 4 rows, got 3",
        ),
        (
            lambda x: advantages.gigpo(FLAT, 2, trajectories=2, anchors=2, step_returns=FLAT[:3]),
            r"gigpo: step_returns: expected \[4\] .* got \[3\]",
        ),
        (
            lambda x: advantages.gigpo(x, None, trajectories=2, anchors=2, step_returns=x),
            "gigpo: groups: expected a size, ids or Groups, got None",
        ),
    ],
)
def test_errors_name_what_came(call, match):
    with pytest.raises(ValueError, match=match):
        call(torch.tensor(REWARDS))


def test_what_cannot_be_looked_at_is_nan(monkeypatch, device):
    monkeypatch.setattr(advantages._groups, "is_checkable", lambda tensor: False)
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.5], device=device)
    ids = torch.tensor([0, 0, 1, 1], device=device)
    got = advantages.passk_analytic(rewards, ids, k=2)
    assert got[:2].isfinite().all()
    assert got[2:].isnan().all()
    assert advantages.passk_analytic(rewards.round(), ids, k=3).isnan().all()
    got = advantages.passk_max(rewards, torch.tensor([0, 0, 1, 0], device=device))
    assert got.isnan().tolist() == [False, False, True, False]
    got = advantages.bnpo(rewards * torch.tensor([1, 1, 3, 3], device=device), ids)
    assert got[:2].isfinite().all()
    assert got[2:].isnan().all()


@pytest.mark.skipif(not backends.has_cuda(), reason="no GPU")
def test_nothing_waits_for_the_gpu():
    rewards = torch.rand(12, device="cuda").round()
    rewards[3] = NAN
    ids = torch.arange(12, device="cuda") % 3
    rows = {"trajectories": ids, "anchors": ids, "step_returns": rewards, "lengths": ids}
    groups = Groups.from_ids(torch.tensor([0, 0, 5] * 4, device="cuda"), num_groups=2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name, function in advantages.METHODS.items():
            taken = inspect.signature(function).parameters
            options = {key: value for key, value in rows.items() if key in taken}
            if name == "gdpo":
                options.pop("lengths")
            if name == "passk_analytic":
                options["k"] = 2
            own = rewards[:, None] if "reward_weights" in taken else rewards
            function(own, ids, **options)
            function(own, groups, **options)
            if "reward_weights" in taken:
                function(own, ids, reward_weights=[2.0], **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("weight", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["grpo", "rloo", "gdpo", "mo_grpo", "weighted_sum_grpo"])
def test_weights_of_components_are_finite(method, weight):
    """NaN times a reward would be a component that was not scored."""
    rewards = torch.tensor([[[1.0, 3.0], [0.0, 0.0], [1.0, 0.0]]])
    with pytest.raises(ValueError, match="reward_weights: expected finite numbers"):
        fastpo.group_advantages(rewards, method=method, reward_weights=[1.0, weight])
