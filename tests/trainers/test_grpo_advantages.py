"""Every advantage by name gets each of its inputs that the trainer knows, or is refused by name."""

import contextlib
import inspect
from types import SimpleNamespace

import pytest
import torch

from fastpo import advantages, surrogates
from fastpo.inputs import inputs_of
from fastpo.trainers import config as configs
from fastpo.trainers import run
from fastpo.trainers.config import ConfigError
from fastpo.trainers.grpo import GRPOTrainer
from fastpo.trainers.grpo_rollouts import Group

# Of a group that is solved, of a mixed one, and of one that is hard and was cut once.
LENGTHS = [[9, 9], [4, 3], [2, 5]]
COMPONENTS = [[[1.0, 0.5], [1.0, 0.5]], [[1.0, 0.0], [0.0, 0.75]], [[0.0, 1.0], [0.0, 0.5]]]
WEIGHTS = [2.0, 0.5]
REQUIRED = {"passk_analytic": {"k": 2}}  # Options without a default.
# The loss is averaged over the tokens of all ranks already.
NOT_OF_THIS_TRAINER = {"rank_tokens"}


def group(row, lengths, components, weights=WEIGHTS):
    ids = [[7 + (i + k) % 20 for i in range(n)] for k, n in enumerate(lengths)]
    rewards = [sum(w * r for w, r in zip(weights, parts, strict=True)) for parts in components]
    truncated = [n == 5 for n in lengths]
    return Group(row, [5, 6], ids, rewards, components, truncated)


class Given:
    """Groups that are there, with the weights of two reward functions."""

    def __init__(self, *groups):
        self.groups, self.rewards = groups, SimpleNamespace(weights=WEIGHTS)

    def __len__(self):
        return len(self.groups)

    def __call__(self, model, index, seed):
        return [self.groups[i] for i in index]


def rollout():
    return Given(*(group(i, LENGTHS[i], COMPONENTS[i]) for i in range(3)))


def trainer(options, rollout, **kwargs):
    config = configs.build(configs.GRPOConfig, options | {"eval_share": 0.0, "batch_size": 1})
    model = kwargs.pop("model", None) or run.load_model(config)
    return GRPOTrainer(
        model, run.training_arguments(config), rollout=rollout, pad_id=0, loss="dapo", **kwargs
    )


def test_a_solved_group_beside_a_mixed_one_raises_its_share(options):
    """DGPO: 25 tokens, of which 7 are of the group that can teach anything."""
    solved = group(0, [9, 9], [[1.0], [1.0]], [1.0])
    mixed = group(1, [4, 3], [[1.0], [0.0]], [1.0])
    given = Given(solved, mixed)
    del given.rewards
    (batch,) = trainer(options, given, advantage="dgpo")._generate([[0, 1]])
    share = 25 / 7 / (1 + 1e-4)
    torch.testing.assert_close(batch["advantages"], torch.tensor([0.0, 0.0, share, -share]))


def test_tokens_that_the_loss_leaves_out_do_not_count(options):
    """Of equal rewards, and truncated: what is left is 7 and 2 tokens."""
    known = {}

    def method(rewards, groups=None, *, lengths: torch.Tensor):
        known["lengths"] = lengths.tolist()
        return rewards

    for changes, want in (
        ({}, [9, 9, 4, 3, 2, 5]),
        ({"mask_truncated": True}, [9, 9, 4, 3, 2, 0]),
        ({"filter_groups": True}, [0, 0, 4, 3, 2, 5]),
    ):
        groups = rollout()
        groups.groups[0].rewards = [1.0, 1.0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(advantages.METHODS, "opo", method)
            trainer(options, groups, advantage="opo", **changes)._generate([[0, 1, 2]])
        assert known["lengths"] == want


CASES = [(name, {}) for name in advantages.METHODS] + [("gdpo", {"convention": "verl"})]


@pytest.mark.parametrize(("name", "more"), CASES)
def test_every_advantage_gets_what_is_known(options, name, more):
    method = advantages.METHODS[name]
    inputs = inputs_of(method)
    more = more | REQUIRED.get(name, {})
    flat = lambda lists: torch.tensor([x for part in lists for x in part], dtype=torch.float32)
    components = flat(COMPONENTS)
    known = {
        "reward_weights": torch.tensor(WEIGHTS),
        "lengths": flat(LENGTHS),
        "difficulty_rewards": components[:, 0],
        "kl": None,
    }
    unknown = inputs.keys() - known.keys() - {"rewards", "groups"} - NOT_OF_THIS_TRAINER
    groups = rollout()
    rewards = components if "reward_weights" in inputs else components @ known["reward_weights"]
    if name in ("passk_analytic", "bnpo"):  # Of rewards in {0, 1}, or [0, 1].
        rewards = components[:, 0]
        for g, parts in zip(groups.groups, COMPONENTS, strict=True):
            g.rewards = [first for first, _ in parts]
    if unknown:
        assert all(inputs[one].is_required for one in unknown), "not given, and nothing says so"
        with pytest.raises(ConfigError, match=rf"({'|'.join(unknown)}): expected given for {name}"):
            trainer(options, groups, advantage=name, advantage_options=more)
        return
    subject = trainer(options, groups, advantage=name, advantage_options=dict(more))
    (batch,) = subject._generate([[0, 1, 2]])
    read = {one for one in inputs.keys() & known.keys() if inputs[one].is_read(more)}
    given = {one: known[one] for one in read if known[one] is not None}
    want = method(rewards, 2, **given, **more)
    torch.testing.assert_close(batch["advantages"], want)
    for one in given:  # Which makes a difference.
        other = given | {one: 1 + 3 * given[one].flip(0)}
        assert not torch.allclose(want, method(rewards, 2, **other, **more)), one


def test_the_kl_of_rloo_is_taken_off_the_rewards(options):
    config = configs.build(configs.GRPOConfig, options | {"eval_share": 0.0})
    model = run.load_model(config)
    groups = rollout()
    subject = trainer(options, groups, model=model, advantage="rloo")
    initial = run.load_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    (batch,) = subject._generate([[0, 1, 2]])
    names = ("input_ids", "attention_mask", "labels")
    sums = []
    with torch.no_grad():
        for one in (model.eval(), initial.eval()):
            sums.append(one(**{n: batch[n] for n in names}, statistic="logprobs").sum(1))
    kl = sums[0] - sums[1]
    rewards = torch.tensor([r for g in groups.groups for r in g.rewards])
    assert kl.abs().min() > 1e-3
    want = advantages.rloo(rewards, 2, kl=kl)
    torch.testing.assert_close(batch["advantages"], want, rtol=1e-4, atol=1e-5)
    without = trainer(options, groups, advantage="rloo", advantage_options={"beta": 0.0})
    assert without.ref_model is None
    (batch,) = without._generate([[0, 1, 2]])
    torch.testing.assert_close(batch["advantages"], advantages.rloo(rewards, 2))


# GRPO of the sum, which it takes from the parts: the trainer gives GRPO that sum.
EQUAL = {("weighted_sum_grpo", "grpo")}


def test_no_advantage_by_name_is_another_one(options):
    """On one batch, with the defaults of each."""
    config = configs.build(configs.GRPOConfig, options | {"eval_share": 0.0})
    found, model = {}, run.load_model(config)
    for name in advantages.METHODS:
        groups = rollout()
        for g in groups.groups:  # In [0, 1].
            g.rewards = [reward / 4 for reward in g.rewards]
            g.components = [[first / 4, second / 4] for first, second in g.components]
        groups.groups[2].components[1] = [0.0, 0.0]
        groups.groups[2].rewards[1] = 0.0
        if name == "passk_analytic":
            for g, parts in zip(groups.groups, COMPONENTS, strict=True):
                g.rewards = [first for first, _ in parts]
        more = {"model": model, "advantage_options": dict(REQUIRED.get(name, {}))}
        with contextlib.suppress(ConfigError):  # Of what is unknown, above.
            subject = trainer(options, groups, advantage=name, **more)
            found[name] = subject._generate([[0, 1, 2]])[0]["advantages"]
    same = {
        (one, other)
        for one in found
        for other in found
        if one > other and torch.allclose(found[one], found[other], rtol=1e-6)
    }
    assert same == EQUAL


@pytest.mark.parametrize("name", ["lengths", "kl", "difficulty_rewards"])
def test_what_is_known_is_not_an_option(options, name):
    with pytest.raises(ConfigError, match=f"advantage_options: {name} is known of each completion"):
        trainer(options, rollout(), advantage="dgpo", advantage_options={name: [1.0]})


def test_options_that_fit_the_groups_are_taken(options):
    """Those that two completions with rewards 0 and 1 would not fit."""
    groups = rollout()
    groups.samples = 8
    trainer(options, groups, advantage="passk_analytic", advantage_options={"k": 4})
    trainer(options, groups, advantage="bnpo", advantage_options={"reward_range": (2.0, 5.0)})
    with pytest.raises(ConfigError, match="at least k = 9"):
        trainer(options, groups, advantage="passk_analytic", advantage_options={"k": 9})


def made(name, logprobs, old, weights):
    """Value and gradient of a preset on the same tokens, with what it needs."""
    logprobs = logprobs.clone().requires_grad_()
    preset = surrogates.PRESETS[name]
    given = dict.fromkeys(preset.needs, weights)
    if "policy_mask" in given:
        given["policy_mask"] = weights > 0.5
    if preset.aggregation.startswith("fixed"):
        given["max_length"] = 9
    advantages_B = torch.tensor([-1.0, -0.5, 2.0, 1.0, -2.0, 0.5]).double()
    mask = torch.arange(8) < torch.tensor([[8], [7], [3], [8], [5], [8]])
    # A part of a step of 60 tokens in 9 sequences.
    out = surrogates.policy_loss(
        logprobs, advantages_B, mask, old_logprobs=old, method=name, num_tokens=60,
        num_sequences=9, accumulation_steps=2, **given,
    )  # fmt: skip
    return out.loss.detach(), torch.autograd.grad(out.loss, logprobs)[0]


def test_presets_are_the_same_only_where_their_settings_are():
    """Off policy, on random tokens: no loss by name is another one in silence."""
    generator = torch.Generator().manual_seed(0)
    random = lambda: torch.rand(6, 8, generator=generator, dtype=torch.float64)
    logprobs, old, weights = -3 * random(), -3 * random(), random()
    names = [n for n, p in surrogates.PRESETS.items() if p.settings.kind != "value"]
    found = {name: made(name, logprobs, old, weights) for name in names}
    for i, one in enumerate(names):
        for other in names[:i]:
            first, second = surrogates.PRESETS[one], surrogates.PRESETS[other]
            bare = [preset._replace(source="", equals="") for preset in (first, second)]
            declared = first.equals == other or bare[0] == bare[1]
            same = all(torch.allclose(a, b) for a, b in zip(found[one], found[other], strict=True))
            assert same == declared, (one, other)


def test_the_trainer_refuses_presets_whose_masks_it_does_not_have(options):
    config = configs.build(configs.GRPOConfig, options | {"eval_share": 0.0})
    args = run.training_arguments(config)
    for name, preset in surrogates.PRESETS.items():
        for needed in preset.needs:
            with pytest.raises(ConfigError, match=needed):
                GRPOTrainer(None, args, rollout=rollout(), pad_id=0, loss=name)


def test_inputs_of_the_policy_loss_are_known():
    """Each tensor that it takes is given here, needed by a preset, or a setting as a tensor."""
    inputs = inputs_of(surrogates.policy_loss)
    source = inspect.getsource(GRPOTrainer.compute_loss)
    needed = {name for preset in surrogates.PRESETS.values() for name in preset.needs}
    given = {"logprobs", "advantages", "mask"} | {n for n in inputs if n in source}
    assert inputs.keys() - given - needed == {"cu_seqlens", "clip_low", "clip_high"}
