"""What ``fastpo train grpo`` refuses, and what it says."""

import pytest
from accelerate import Accelerator
from grpo_parts import make_groups
from test_grpo import ONLINE, grpo
from tiny_rows import make_pairs, write_jsonl

from fastpo.data.records import DataError
from fastpo.trainers.config import ConfigError
from fastpo.trainers.grpo_rewards import RewardError, load_rewards


@pytest.fixture
def online(options, tmp_path):
    data = write_jsonl(tmp_path / "p.jsonl", [{"prompt": p["prompt"]} for p in make_pairs(8)])
    return options | ONLINE | {"data": data, "eval_share": 0.0, "batch_size": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": [1.0, 0.0]}, r"line 2: 3 completions and 2 rewards"),
        ({"rewards": None}, r"line 2: field 'rewards': expected a list.*pass --reward"),
        ({"completions": []}, r"line 2: field 'completions': expected a list"),
        ({"completions": ["a", "b", 3]}, r"line 2: field 'completions\[2\]': expected a string"),
        ({"completions": "abc"}, r"line 2: field 'completions': expected a list"),
    ],
)
def test_damaged_groups_are_named(options, tmp_path, change, message):
    rows = make_groups(4)
    rows[1] |= change
    data = write_jsonl(tmp_path / "g.jsonl", rows)
    with pytest.raises(DataError, match=message):
        grpo(options, {"data": data, "eval_share": 0.0})


@pytest.mark.parametrize("value", ["high", float("inf"), [1.0], pytest.param(10**400, id="huge")])
def test_rewards_that_are_no_numbers_are_named(options, tmp_path, value):
    rows = make_groups(4)
    rows[2]["rewards"][1] = value
    data = write_jsonl(tmp_path / "g.jsonl", rows)
    with pytest.raises(RewardError, match=r"line 3: rewards\[1\]: expected a finite number"):
        grpo(options, {"data": data, "eval_share": 0.0})


@pytest.mark.parametrize("rewards", [[1.0] * 3, [None] * 3, [float("nan"), None, 1.0]])
def test_groups_that_teach_nothing_are_refused(options, tmp_path, rewards):
    rows = [row | {"rewards": rewards} for row in make_groups(4)]
    data = write_jsonl(tmp_path / "g.jsonl", rows)
    with pytest.raises(DataError, match="in all 4 groups they are equal, or there is one only"):
        grpo(options, {"data": data, "eval_share": 0.0})


def test_groups_of_one_are_refused(options, online, tmp_path):
    data = write_jsonl(tmp_path / "g.jsonl", make_groups(4, sizes=(1,)))
    with pytest.raises(DataError, match="or there is one only"):
        grpo(options, {"data": data, "eval_share": 0.0})
    with pytest.raises(ConfigError, match="samples: expected 2 or more per prompt, got 1"):
        grpo(online, {"samples": 1, "output": str(tmp_path / "other")})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unscored", "none of the .* completions of rows .* has a score"),
        ("too_few", r"reward too_few: expected 6 scores, got 1"),
        ("no_list", r"reward no_list: expected 6 scores, got a float"),
        ("by_number", r"reward by_number: expected 6 scores, got a dict"),
        ("endless", r"reward endless, completion 0: expected a finite number, got inf"),
        ("broken", r"reward broken: raised KeyError: 'answer' \(.*grpo_parts.py, line \d+\)"),
    ],
)
def test_reward_functions_that_fail_are_named(online, name, message):
    with pytest.raises(RewardError, match=message):
        grpo(online, {"reward": f"grpo_parts:{name}"})


def test_a_failure_on_another_rank_ends_this_one(online, monkeypatch):
    monkeypatch.setattr(Accelerator, "reduce", lambda self, tensor, reduction: tensor + 1)
    with pytest.raises(RewardError, match="failed on another rank"):
        grpo(online)
    with pytest.raises(RewardError, match="reward broken: raised KeyError"):
        grpo(online, {"reward": "grpo_parts:broken"})


@pytest.mark.parametrize("name", ["grpo_parts", "grpo_parts:nothing", "no_such_module:reward"])
def test_names_of_rewards_are_checked(name):
    with pytest.raises(ConfigError, match=r"expected package\.module:function"):
        load_rewards(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "dpo"}, "method: expected one of"),
        ({"advantage": "gae"}, "method: expected one of"),
        ({"advantage": "gigpo"}, "given for gigpo"),
        ({"loss": "kl_cov"}, "penalties"),
        ({"loss_options": {"clip": 0.2}}, "clip"),
        ({"advantage_options": {"ddoff": 0}}, "ddoff"),
        ({"reference": "adapter", "beta": 0.1}, "reference: 'adapter' needs a LoRA"),
        ({"temperature": 0.0}, r"temperature: expected a number above 0, got 0\.0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected 1 or more, got 0"),
        ({"num_iterations": 0}, "num_iterations: expected 1 or more, got 0"),
        ({"num_iterations": 3}, r"expected a multiple of 3 .* got"),
        ({"batch_size": 5, "accumulation": 2}, "a generation takes 10 prompts, there are 8"),
        ({"max_new_tokens": 2000}, "max_length: leaves -976 tokens to prompts"),
        ({"sampler": "vllm"}, "vllm cannot be imported"),
    ],
)
def test_options_that_do_not_fit_are_named(online, change, message):
    with pytest.raises(ConfigError, match=message):
        grpo(online, change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "sglang"}, "sampler: expected one of transformers, vllm"),
        ({"reference": "cached"}, "reference: expected one of auto, adapter, copy"),
        ({"batch_size": 0}, "batch_size: expected 1 or more, got 0"),
        ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\], got 0\.0"),
        ({"eval_share": 0.5, "reward": ""}, "given completions are not scored"),
    ],
)
def test_choices_are_named(online, change, message):
    with pytest.raises(ConfigError, match=message):
        grpo(online, change)


def test_save_steps_may_be_a_share(online):
    online["trainer"] = online["trainer"] | {"save_steps": 0.5}
    assert grpo(online, {"num_iterations": 2, "max_steps": 4})["steps"] == 4


def test_missing_file_is_named(online):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        grpo(online, {"data": "nowhere.jsonl"})
