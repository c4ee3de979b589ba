"""Advantages of groups: published vectors, in every form groups come in."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close_to_truth

from fastpo import advantages
from fastpo.groups import Groups

REWARDS = [[1, 0, 0.5, 1], [0, 0, 0, 0], [1, 0, 0, 0]]
LENGTHS = [[3, 5, 4, 8], [2, 2, 6, 6], [4, 1, 1, 2]]
ZERO = [0.0] * 4
COMPONENTS = [[[1, 0, 0, 1], [0, 0, 1, 1]], [[0, 1, 0, 1], [1, 1, 1, 1]]]
BINARY = [[1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]]
FORMS = ("rows", "size", "ids", "offsets", "shuffled")


def _lead(first, others):
    return [first, others, others, others]


GRPO = [[0.7831858496, -1.3053097494, -0.2610619499, 0.7831858496], ZERO]
VECTORS = {
    "grpo": (REWARDS, {}, [*GRPO, _lead(1.4997000600, -0.4999000200)]),
    "grpo-verl": (
        REWARDS[:1],
        {"convention": "verl"},
        [[0.7833478154, -1.3055796924, -0.2611159385, 0.7833478154]],
    ),
    "dr_grpo": (
        REWARDS,
        {},
        [[0.375, -0.625, -0.125, 0.375], ZERO, [0.75, -0.25, -0.25, -0.25]],
    ),
    "rloo": (
        REWARDS,
        {},
        [[0.5, -5 / 6, -1 / 6, 0.5], ZERO, _lead(1, -1 / 3)],
    ),
    "rloo-normalize": (
        REWARDS,
        {"normalize": True},
        [
            [1.0371309395, -1.7285515658, -0.3457103132, 1.0371309395],
            ZERO,
            _lead(2.0742618789, -0.6914206263),
        ],
    ),
    "reinforce_pp_baseline": (
        REWARDS,
        {"lengths": LENGTHS},
        [
            [0.8574958872, -1.8374911867, -0.4899976498, 0.8574958872],
            [-0.1531242655] * 4,
            _lead(1.8681160399, -0.8268710340),
        ],
    ),
    "gpg": (
        REWARDS,
        {},
        [[1.125, -1.875, -0.375, 1.125], ZERO, _lead(2.25, -0.75)],
    ),
    "opo": (
        REWARDS,
        {"lengths": LENGTHS},
        [[0.35, -0.65, -0.15, 0.35], ZERO, _lead(0.5, -0.5)],
    ),
    "passk_max": (REWARDS, {}, [ZERO, ZERO, _lead(1.9999960000, 0)]),
    "passk_analytic": (
        BINARY,
        {"k": 4},
        [[0.5222316951] * 2 + [-0.1740772317] * 6, [0.0] * 8],
    ),
    "passk_analytic-paper": (
        BINARY[:1],
        {"k": 4, "eps": 0.0},
        [[0.5222329679] * 2 + [-0.1740776560] * 6],
    ),
    "bnpo": (
        REWARDS,
        {},
        [
            [0.3591213834, -0.5985356390, -0.1197071278, 0.3591213834],
            ZERO,
            _lead(0.6622810080, -0.2207603360),
        ],
    ),
    "gdpo": (
        COMPONENTS,
        {},
        [[0, 0, -1.5273905051, 1.5273905051], [-0.7636952526] * 2 + [0.7636952526] * 2],
    ),
    "mo_grpo": (
        [[[1, 0, 1, 0]], [[0, 100, 50, 0]]],
        {"eps": 0.0},
        [[0.082675952, 0.4395570159, 1.1271418877, -1.6493748556]],
    ),
    "weighted_sum_grpo": (COMPONENTS, {}, None),
    "dgpo": (
        REWARDS,
        {"lengths": LENGTHS},
        [
            [1.4244422738, -2.3740704563, -0.4748140913, 1.4244422738],
            ZERO,
            _lead(3.4364107184, -1.1454702395),
        ],
    ),
    "dgpo-step_1": (
        REWARDS,
        {"difficulty_weights": False},
        [
            [0.9999333378, -1.6665555630, -0.3333111126, 0.9999333378],
            ZERO,
            _lead(1.9998666756, -0.6666222252),
        ],
    ),
    "ngrpo": (
        REWARDS,
        {},
        [
            [0.6708188933, -1.5652440843, -0.4472125955, 0.6708188933],
            [-0.4472125955] * 4,
            _lead(1.0954431150, -0.7302954100),
        ],
    ),
}


def _close(got, want):
    """Ten digits are published, more than float32 has."""
    want = torch.as_tensor(want, dtype=torch.float64)
    if got.dtype == torch.float64:
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=1e-9)
    else:
        assert_close_to_truth(got, want, want.float())


def call(name, rewards, options, dtype, device, form):
    """In one of the forms of groups; the result as [P, G]."""
    function = getattr(advantages, name.partition("-")[0])
    rewards = torch.tensor(rewards, dtype=dtype, device=device)
    if rewards.ndim == 3:
        rewards = rewards.permute(1, 2, 0)
    options = {
        name: torch.tensor(x, device=device) if isinstance(x, list) else x
        for name, x in options.items()
    }
    if form == "rows":
        return function(rewards, **options)
    prompts, size = rewards.shape[:2]
    rows = prompts * size
    flat = lambda x: x.flatten(0, 1) if isinstance(x, torch.Tensor) else x
    order = torch.randperm(rows) if form == "shuffled" else torch.arange(rows)
    ids = torch.arange(rows) // size
    groups = {
        "size": size,
        "ids": 9 - ids.to(device),
        "offsets": Groups.from_offsets(torch.arange(0, rows + 1, size).to(device), rows),
        "shuffled": (ids * 77 - 5)[order].to(device),
    }[form]
    order = order.to(device)
    options = {
        k: x[order] if isinstance(x := flat(v), torch.Tensor) else x for k, v in options.items()
    }
    got = function(flat(rewards)[order], groups, **options)
    return torch.empty_like(got).scatter_(0, order, got).reshape(prompts, size)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", [name for name in VECTORS if VECTORS[name][2]])
def test_vector(name, dtype, device, form):
    rewards, options, want = VECTORS[name]
    got = call(name, rewards, options, dtype, device, form)
    assert got.dtype == dtype
    _close(got, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_grpo_of_the_batch(dtype, device):
    rewards = torch.tensor(REWARDS, dtype=dtype, device=device)
    got = advantages.grpo(rewards, scale="batch")
    _close(got[2], _lead(1.6656734859, -0.5552244953))
    std = rewards.double().std()
    _close(std, 0.4501683187 + 2e-11)  # ten digits of 0.45016831873...
    _close(got, advantages.dr_grpo(rewards.double()).cpu() / (std.cpu() + 1e-4))


def test_grpo_on_the_sum_of_components(device):
    got = call("weighted_sum_grpo", COMPONENTS, {}, torch.float64, device, "rows")
    _close(got[0], [0, 0, -1.2245948898, 1.2245948898])


def test_dgpo_of_parts(device):
    rewards = torch.tensor(REWARDS, dtype=torch.float64, device=device)
    lengths = torch.tensor(LENGTHS, device=device)
    plain = advantages.dgpo(rewards, difficulty_weights=False)
    tokens = advantages.dgpo(rewards, lengths=lengths, difficulty_weights=False)
    weighted = advantages.dgpo(rewards)
    _close(tokens, 1.5714285714285714 * plain.cpu())
    _close(weighted[0], 0.9065236960 * plain[0].cpu())
    _close(weighted[2], 1.0934763040 * plain[2].cpu())


def test_bnpo_of_three_even_rates(device):
    rewards = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0], [1, 0, 1, 0.0]], dtype=torch.float64)
    got = advantages.bnpo(rewards.to(device)).cpu()
    weights = torch.tensor([0.9068996821, 0.9068996821, 0.7853981634], dtype=torch.float64)
    _close(got, weights[:, None] * (rewards - rewards.mean(1, keepdim=True)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gigpo_vector(dtype, device):
    rewards = torch.tensor([1, 1, 1, 0, 0], dtype=dtype, device=device)
    returns = torch.tensor([0.9025, 0.95, 1, 0, 0], dtype=dtype, device=device)
    x, y, z = 11, -7, 5
    anchors = torch.tensor([x, y, x, x, z], device=device)
    trajectories = torch.tensor([0, 0, 0, 1, 1], device=device)
    got = advantages.gigpo(
        rewards, 5, trajectories=trajectories, anchors=anchors, step_returns=returns
    )
    _close(got, [0.76833333333333, 0.5, 0.86583333333333, -1.13416666666667, -0.5])
    steps = torch.tensor([0, 1, 2, 0, 1], device=device)
    own = torch.tensor([0, 0, 1, 0, 0], dtype=dtype, device=device)
    computed = advantages.step_returns(own, Groups.from_ids(trajectories), steps, gamma=0.95)
    torch.testing.assert_close(computed, returns)
    # Trajectories of three steps and of two: each step counts once, as in the released code.
    rows = dict(trajectories=trajectories, anchors=anchors, step_returns=returns)
    got_steps = advantages.gigpo(rewards, 5, **rows, counted="steps")
    _close(got_steps, [0.66833333333333, 0.4, 0.76583333333333, -1.23416666666667, -0.6])
    # The same twice, in two groups with the same anchors.
    twice = advantages.gigpo(
        rewards.repeat(2),
        5,
        trajectories=torch.cat([trajectories, trajectories + 2]),
        anchors=anchors.repeat(2),
        step_returns=returns.repeat(2),
    )
    _close(twice, got.cpu().repeat(2))
    scaled = advantages.gigpo(
        rewards,
        5,
        trajectories=trajectories,
        anchors=anchors,
        step_returns=returns,
        step_weight=0.5,
        scale="group",
    )
    mates = returns[[0, 2, 3]].double()
    want = torch.tensor([1, 1, 1, -1, -1.0], device=device).double() * 0.5 / (0.5**0.5 + 1e-6)
    want[[0, 2, 3]] += 0.5 * (mates - mates.mean()) / (mates.std() + 1e-6)
    _close(scaled, want.cpu())


@pytest.mark.parametrize(
    ("options", "want"),
    [({}, [0.5, 0.5, 0.5, -0.5]), ({"counted": "steps"}, [0.25, 0.25, 0.25, -0.75])],
)
def test_gigpo_counts_trajectories_or_steps(options, want, device):
    """R = 1 over three steps against R = 0 over one; no two steps start alike."""
    rewards = torch.tensor([1, 1, 1, 0], dtype=torch.float64, device=device)
    rows = dict(
        trajectories=torch.tensor([0, 0, 0, 1], device=device),
        anchors=torch.arange(4, device=device),
        step_returns=rewards,
    )
    _close(advantages.gigpo(rewards, 4, **rows, **options), want)
    got = advantages.group_advantages(rewards, 4, "gigpo", **rows, **options)
    assert torch.equal(got, advantages.gigpo(rewards, 4, **rows, **options))
