"""How reward functions are called, and what becomes of those that do not answer."""

import asyncio
import functools
import os
import re
import signal
import sys
import threading
import time

import pytest
import torch
from transformers import AutoTokenizer, TrainerState

from fastpo.trainers import grpo_rewards
from fastpo.trainers.config import ConfigError
from fastpo.trainers.grpo_rewards import RewardError, Rewards, load_rewards
from fastpo.trainers.grpo_rollouts import SampledGroups

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def written(model, prompt_ids, samples, seed):
    """Completions of two tokens."""
    return [[[4 + k, 5] for k in range(samples)] for _ in prompt_ids], None


def groups(model_folder, rows, *functions, seconds=600.0):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = TEMPLATE
    rows = [{"row": i, **row} for i, row in enumerate(rows)]
    return SampledGroups(
        rows, tokenizer, Rewards(functions, seconds=seconds), written, samples=2, max_new_tokens=2,
        max_prompt_length=8, batch_size=2,
    )  # fmt: skip


@pytest.mark.parametrize("seconds", [600.0, 0.0])
def test_arguments_are_keywords_whatever_their_order(model_folder, seconds):
    seen = {}

    def reward(completions, prompts, **columns):
        seen.update(columns, completions=completions, prompts=prompts)
        return [1.0, 0.0] * 2

    def some(*, answer, completion_ids):
        return [float(len(ids)) for ids in completion_ids]

    rows = [{"prompt": "red", "answer": "1"}, {"prompt": "blue", "answer": "2"}]
    rollout = groups(model_folder, rows, reward, some, seconds=seconds)
    rollout.trainer_state = state = TrainerState(global_step=3)
    found = rollout(None, [1, 0], 0)
    assert [group.components for group in found] == [[[1.0, 2.0], [0.0, 2.0]]] * 2
    assert seen.pop("prompts") == ["blue", "blue", "red", "red"]
    assert seen.pop("completions") == rollout.tokenizer.batch_decode([[4, 5], [5, 5]] * 2)
    assert seen.pop("completion_ids") == [[4, 5], [5, 5]] * 2
    assert seen.pop("trainer_state") is state
    assert seen == {"answer": ["2", "2", "1", "1"]}


def test_completions_of_messages_are_messages(model_folder):
    def reward(prompts, completions):
        for prompt, (message,), ids in zip(prompts, completions, [4, 5], strict=True):
            assert prompt == [{"role": "user", "content": "red"}]
            assert message == {"role": "assistant", "content": tokenizer.decode([ids, 5])}
        return [0.0, 1.0]

    rollout = groups(model_folder, [{"prompt": [{"role": "user", "content": "red"}]}], reward)
    tokenizer = rollout.tokenizer
    assert rollout(None, [0], 0)[0].rewards == [0.0, 1.0]


@pytest.mark.parametrize("seconds", [600.0, 0.0])
def test_what_a_reward_changes_nobody_else_sees(model_folder, seconds):
    seen = []

    def changes(prompts, completions, completion_ids, tags, **columns):
        seen.append(repr((prompts, completions, completion_ids, tags)))
        for b in range(len(completions)):
            prompts[b][0]["content"] = completions[b][0]["content"] = "changed"
            completion_ids[b][:] = [0]
            tags[b]["of"].append("changed")
        del prompts[1:], completions[1:], completion_ids[1:], tags[1:]
        return [1.0, 0.0]

    row = {"prompt": [{"role": "user", "content": "red"}], "tags": {"of": ["a"]}}
    rollout = groups(model_folder, [row], changes, changes, seconds=seconds)
    for _ in range(2):
        assert rollout(None, [0], 0)[0].ids == [[4, 5], [5, 5]]
    assert len(seen) == 4
    assert len(set(seen)) == 1
    assert "changed" not in repr(rollout.rows)


@pytest.mark.parametrize("seconds", [600.0, 0.0])
@pytest.mark.parametrize("is_async", [False, True])
def test_rewards_run_in_the_modes_of_the_caller(seconds, is_async):
    def modes():
        on, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), on and dtype

    def reward(completions):
        seen.append(modes())
        return [0.0]

    async def awaited(completions):
        await asyncio.sleep(0)
        return reward(completions)

    rewards = Rewards([awaited if is_async else reward], seconds=seconds)
    half = torch.autocast("cpu", torch.float16)
    for mode in (torch.no_grad(), torch.enable_grad(), torch.inference_mode(), half):
        seen = []
        with mode:
            rewards(["a"], ["b"])
            assert seen == [modes()]


class OfObject:
    def __init__(self):
        self.loops = set()

    async def __call__(self, completions, **columns):
        await asyncio.sleep(0)
        self.loops.add(asyncio.get_running_loop())
        return [len(c) for c in completions]


async def of_function(completions, scale=1.0):
    return [scale for _ in completions]


@pytest.mark.parametrize("seconds", [600.0, 0.0])
def test_asynchronous_rewards_are_awaited_in_one_loop(seconds):
    first = OfObject()
    functions = first, of_function, functools.partial(of_function, scale=2.0)
    rewards = Rewards(functions, seconds=seconds)
    for _ in range(2):
        assert rewards(["a"], ["bcd"]) == [[3.0, 1.0, 2.0]]
    assert len(first.loops) == 1


RELEASE = threading.Event()


def sleeps(completions):
    RELEASE.wait(60)


def swallows(completions):
    while not RELEASE.is_set():
        try:
            time.sleep(0.01)
        except BaseException:
            pass


async def awaits(completions):
    while not RELEASE.is_set():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("reward", [sleeps, swallows, awaits])
def test_a_reward_that_does_not_end_is_named(reward):
    RELEASE.clear()
    started = time.monotonic()
    with pytest.raises(RewardError, match=rf"reward {reward.__name__}: .* within 0.2 s; raise rew"):
        Rewards([reward], seconds=0.2)(["a"], ["b"])
    assert time.monotonic() - started < 10
    RELEASE.set()


def holds_the_interpreter(completions):
    return [re.match("(a+)+$", text) for text in completions]


def test_a_reward_that_holds_the_interpreter_ends_the_program(tmp_path, monkeypatch):
    """In a copy of this process, which would otherwise go on for years."""
    monkeypatch.setattr(grpo_rewards, "_GRACE", 0.2)
    with (tmp_path / "errors").open("w+") as errors:
        process = os.fork()
        if not process:
            monkeypatch.setattr(sys, "__stderr__", errors)
            Rewards([holds_the_interpreter], seconds=0.2)(["a"], ["a" * 60 + "b"])
            os._exit(7)
        deadline = time.monotonic() + 30
        while not (ended := os.waitpid(process, os.WNOHANG))[0] and time.monotonic() < deadline:
            time.sleep(0.05)
        if not ended[0]:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    assert ended[0]
    assert os.waitstatus_to_exitcode(ended[1]) == 1
    told = (tmp_path / "errors").read_text()
    assert "Timeout" in told
    assert "in holds_the_interpreter" in told


def leaves(completions):
    sys.exit(3)


def interrupts(completions):
    raise KeyboardInterrupt


def fails(completions):
    raise TimeoutError("of the judge")


@pytest.mark.parametrize(
    ("reward", "message"),
    [(leaves, "SystemExit: 3"), (interrupts, "KeyboardInterrupt: "), (fails, "TimeoutError: of t")],
)
def test_leaving_the_program_is_an_error_of_the_function(reward, message):
    with pytest.raises(RewardError, match=rf"reward {reward.__name__}: raised {message}.*line \d"):
        Rewards([reward])(["a"], ["b"])


def test_an_exit_is_an_error_in_the_calling_thread_too():
    with pytest.raises(RewardError, match="reward leaves: raised SystemExit: 3"):
        Rewards([leaves], seconds=0.0)(["a"], ["b"])


@pytest.mark.parametrize(
    "reward",
    [lambda p, completions: None, lambda completions, solution, **kw: None, lambda x, /: None],
)
def test_parameters_that_nothing_gives_are_refused_before_anything_is_sampled(model_folder, reward):
    match = r"takes (p|solution|x); there are prompts, completions, .*answer\. .* keywords"
    with pytest.raises(ConfigError, match=match):
        groups(model_folder, [{"prompt": "red", "answer": "1"}], reward)


@pytest.mark.parametrize("value", [1e39, -(10**400), float("inf"), "1"])
def test_a_score_fits_float32(value):
    with pytest.raises(RewardError, match=r"completion 0: expected a finite number, got .*float32"):
        Rewards([lambda completions: [value]])(["a"], ["b"])


def test_a_limit_is_a_number():
    with pytest.raises(ConfigError, match="reward_seconds: expected 0 or more, got -1"):
        Rewards([leaves], seconds=-1)


def test_names_are_resolved_through_attributes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_scores.py").write_text("class Of:\n    def length(completions): pass\n")
    (tmp_path / "my_exit.py").write_text("raise SystemExit(2)\n")
    functions = load_rewards("my_scores:Of.length, my_scores.Of.length")
    assert [f.__qualname__ for f in functions] == ["Of.length"] * 2
    with pytest.raises(ConfigError, match=r"'my_exit:f' \(SystemExit: 2\)"):
        load_rewards("my_exit:f")
    with pytest.raises(ConfigError, match="'my_scores', which is a module"):
        load_rewards("my_scores")


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, float("nan")], [float("inf"), 1.0]])
def test_weights_that_leave_no_reward_are_refused(weights):
    with pytest.raises(ConfigError, match="reward_weights: expected finite numbers that are not"):
        Rewards([len, len], weights)
    assert Rewards([len, len], [0.0, -1.0]).weights == [0.0, -1.0]
