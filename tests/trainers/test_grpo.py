import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from grpo_parts import make_groups, write_groups
from safetensors.torch import load_file
from tiny_rows import make_pairs, write_jsonl

from fastpo.surrogates import policy_loss
from fastpo.trainers import config as configs
from fastpo.trainers import run
from fastpo.trainers.grpo import GRPOTrainer
from fastpo.trainers.grpo_rollouts import GivenGroups, read_rows
from fastpo.trainers.head import shift_labels

ONLINE = {"reward": "grpo_parts:vowels", "samples": 3, "max_new_tokens": 6, "sample_batch_size": 1}
# Weights of Adam's first steps depend on the sign of tiny gradients.
SGD = {"trainer": {"optim": "sgd", "max_grad_norm": 0.0}, "schedule": "constant"}


@pytest.fixture
def online(options, tmp_path):
    """Options of a run that samples."""
    rows = [{"prompt": pair["prompt"], "bonus": i} for i, pair in enumerate(make_pairs(8))]
    return options | ONLINE | {
        "data": write_jsonl(tmp_path / "prompts.jsonl", rows), "eval_share": 0.0, "batch_size": 2,
    }  # fmt: skip


@pytest.fixture
def offline(options, tmp_path):
    """Options of a run on given groups of different sizes."""
    data = write_groups(tmp_path / "groups.jsonl", 8, sizes=(3, 2, 4))
    return options | {"data": data, "eval_share": 0.0, "batch_size": 2}


@pytest.fixture
def records(monkeypatch):
    """What every forward of a loss got and gave."""
    seen = []
    plain = GRPOTrainer.compute_loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, out = plain(self, model, inputs, True, num_items_in_batch)
        seen.append({**inputs, "loss": loss.detach(), "num_tokens": num_items_in_batch, "out": out})
        return loss

    monkeypatch.setattr(GRPOTrainer, "compute_loss", compute_loss)
    return seen


def grpo(*sources):
    return run.train_grpo(configs.build(configs.GRPOConfig, *sources))


def weights(options):
    return load_file(Path(options["output"]) / "model.safetensors")


def history(options):
    last = sorted(Path(options["output"]).glob("checkpoint-*"))[-1]
    return json.loads((last / "trainer_state.json").read_text())["log_history"]


def test_online_run_logs_rewards_and_evaluates(online):
    results = grpo(online, {"eval_share": 0.25})
    assert results["steps"] == 4
    assert {"before", "after"} <= results.keys()
    assert results["before"]["eval_rewards/mean"] >= 0
    logged = history(online)[1]
    names = ("rewards/mean", "rewards/std", "groups/equal", "completions/length")
    assert all(name in logged for name in names)
    # In the only step on a generation the ratio is 1: it is no news.
    assert not any(name.startswith(("ratio", "clip_ratio")) for name in logged)


def test_batch_is_of_whole_groups_with_their_advantages(offline, records):
    grpo(offline, {"max_steps": 1, "advantage_options": {"scale": "none"}})
    rows = {row["row"]: row for row in read_rows(offline["data"])}
    (batch,) = records
    start = 0
    for row in dict.fromkeys(batch["row"].tolist()):
        rewards = torch.tensor(rows[row]["rewards"])
        got = batch["advantages"][start : start + len(rewards)]
        torch.testing.assert_close(got, rewards - rewards.mean())
        start += len(rewards)
    assert start == len(batch["labels"])
    assert batch["num_tokens"] == (batch["labels"] != -100).sum()


def test_given_groups_are_off_policy_from_the_initial_model(offline, records, tmp_path):
    """Old log-probs are those of the model at the start, in all steps."""
    grpo(offline, {"max_steps": 3, "learning_rate": 1e-2, "beta": 0.1})
    model = run.load_model(configs.build(configs.GRPOConfig, offline))
    for step, batch in enumerate(records):
        names = ("input_ids", "attention_mask", "labels")
        with torch.no_grad():
            want = model(**{n: batch[n] for n in names}, statistic="logprobs")
        torch.testing.assert_close(batch["old_logprobs"], want)
        assert torch.equal(batch["old_logprobs"], batch["ref_logprobs"])
        is_one = abs(batch["out"].metrics["ratio/max"] - 1) < 1e-5
        assert is_one == (step == 0)
    assert {"kl", "clip_ratio/region_mean", "approx_kl"} <= history(offline)[-1].keys()


def test_old_logprobs_are_of_the_generation_in_all_its_steps(online, records):
    changes = {"steps_per_generation": 2, "num_iterations": 2, "learning_rate": 1e-2}
    grpo(online, changes, {"save_steps": 4, "max_steps": 4})
    first, second, again, last = records
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert torch.equal(first["old_logprobs"], again["old_logprobs"])
    assert torch.equal(second["input_ids"], last["input_ids"])
    assert set(first["row"].tolist()).isdisjoint(second["row"].tolist())
    assert first["out"].metrics["ratio/max"] == pytest.approx(1)
    assert again["out"].metrics["ratio/max"] != pytest.approx(1)


@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("split", [{"batch_size": 2, "accumulation": 2}, {"forward_rows": 3}])
def test_splitting_a_step_leaves_it_as_it_is(offline, tmp_path, loss, split):
    """Batches and forwards have different numbers of rows and tokens."""
    one = offline | {"batch_size": 4, "max_steps": 2, "loss": loss, "learning_rate": 0.1}
    one["max_length"] = 24  # Which divides the loss of dr_grpo.
    one["trainer"] = one["trainer"] | SGD["trainer"]
    grpo(one)
    many = one | {"output": str(tmp_path / "many")} | split
    grpo(many)
    got, want = weights(many), weights(one)
    start = load_file(Path(one["model"]) / "model.safetensors")
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6, msg=name)
    assert any((want[name] - start[name]).abs().max() > 1e-3 for name in want)


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo"])
def test_batches_of_left_out_groups_alone_count_nowhere(offline, tmp_path, loss):
    """In batches of one prompt some have no completion left, in a batch of all none has."""
    rows = make_groups(4)
    for row in rows[:2]:
        row["rewards"] = [1.0] * 3
    one = offline | {"data": write_jsonl(tmp_path / "some.jsonl", rows), "filter_groups": True}
    one |= {"batch_size": 4, "max_steps": 1, "loss": loss, "learning_rate": 0.1, "max_length": 24}
    one["trainer"] = one["trainer"] | SGD["trainer"]
    grpo(one)
    many = one | {"output": str(tmp_path / "many"), "batch_size": 1, "accumulation": 4}
    grpo(many)
    got, want = weights(many), weights(one)
    start = load_file(Path(one["model"]) / "model.safetensors")
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6, msg=name)
    assert any((want[name] - start[name]).abs().max() > 1e-3 for name in want)


def test_temperature_and_entropy_reach_the_head(online, records):
    grpo(online, {"max_steps": 1, "temperature": 0.7, "entropy_coef": 0.01})
    (batch,) = records
    model = run.load_model(configs.build(configs.GRPOConfig, online))
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits / 0.7
    mask = shift_labels(batch["labels"]) >= 0
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)[mask].mean()
    torch.testing.assert_close(batch["out"].metrics["entropy"], entropy)
    chosen = logprobs.gather(-1, shift_labels(batch["labels"]).clamp(min=0)[..., None]).squeeze(-1)
    want = policy_loss(chosen, batch["advantages"], mask, method="dapo").loss - 0.01 * entropy
    torch.testing.assert_close(batch["loss"], want)


def test_truncated_completions_and_equal_groups_are_left_out(options, tmp_path, records):
    rows = make_groups(4)
    rows[0]["rewards"] = [1.0] * 3
    rows[1]["completions"][1] = " red blue" * 30
    data = write_jsonl(tmp_path / "groups.jsonl", rows)
    given = {"data": data, "eval_share": 0.0, "batch_size": 1, "max_length": 30, "max_steps": 4}
    grpo(options, given, {"mask_truncated": True, "filter_groups": True})
    batches = {batch["row"][0].item(): batch for batch in records}
    filled = {row: (b["labels"] != -100).any(1).tolist() for row, b in batches.items()}
    assert filled == {1: [False], 2: [True, False, True], 3: [True] * 3, 4: [True] * 3}
    assert batches[1]["loss"] == 0
    assert batches[1]["metrics"]["groups/equal"] == 1
    assert batches[1]["metrics"]["rewards/mean"] == 1
    assert batches[2]["metrics"]["completions/truncated"] == pytest.approx(1 / 3)


def test_components_reach_the_advantages_apart(online, records, tmp_path):
    changes = {"reward": "grpo_parts:vowels,grpo_parts:shortness", "reward_weights": "1,0.5"}
    grpo(online, changes, {"advantage": "gdpo", "max_steps": 1})
    assert records[0]["advantages"].isfinite().all()
    wrong = changes | {"reward_weights": "1", "output": str(tmp_path / "other")}
    with pytest.raises(configs.ConfigError, match="2 functions and 1 weights"):
        grpo(online, wrong)


def test_columns_and_missing_scores(online, records):
    grpo(online, {"reward": "grpo_parts:of_column,grpo_parts:sometimes", "max_steps": 1})
    # Equal in a group: only the second function tells completions apart, where it scores.
    assert records[0]["advantages"].isfinite().all()
    rows = {row["row"]: row["bonus"] for row in read_rows(online["data"])}
    want = sum(rows[row] for row in records[0]["row"].tolist()) / len(records[0]["row"])
    assert records[0]["metrics"]["rewards/mean"] == pytest.approx(want, abs=0.5)


def test_rewards_come_as_arrays_and_tensors(online, records):
    grpo(online, {"reward": "grpo_parts:as_array,grpo_parts:as_tensor", "max_steps": 1})
    assert 0 < records[0]["metrics"]["rewards/mean"] < 100


def test_columns_that_some_rows_lack_are_none_there(online, tmp_path, records):
    rows = [{"prompt": pair["prompt"]} for pair in make_pairs(4)]
    rows[3]["bonus"] = 1.0
    data = write_jsonl(tmp_path / "some.jsonl", rows)
    changes = {"data": data, "reward": "grpo_parts:of_column,grpo_parts:vowels", "max_steps": 2}
    grpo(online, changes)
    assert {row for batch in records for row in batch["row"].tolist()} == {1, 2, 3, 4}


def test_lora_reference_is_the_disabled_adapter(offline, records):
    pytest.importorskip("peft")
    grpo(offline, {"lora_r": 2, "beta": 0.1, "max_steps": 2, "learning_rate": 1e-2})
    model = run.load_model(configs.build(configs.GRPOConfig, offline))
    names = ("input_ids", "attention_mask", "labels")
    for batch in records:
        with torch.no_grad():
            want = model(**{n: batch[n] for n in names}, statistic="logprobs")
        torch.testing.assert_close(batch["ref_logprobs"], want)
    assert records[1]["out"].metrics["kl"] > 0


def test_given_groups_keep_their_rows(offline, model_folder):
    rows = read_rows(offline["data"])
    groups = GivenGroups(rows, run.load_tokenizer(model_folder), 64)
    assert [len(group.ids) for group in groups.groups] == [3, 2, 4, 3, 2, 4, 3, 2]
    assert groups(None, [2], 0)[0].rewards == rows[2]["rewards"]
    assert not any(cut for group in groups.groups for cut in group.truncated)


def test_a_rank_sends_the_same_kind_of_numbers_whatever_it_has(online, monkeypatch):
    """Of one held-out prompt a second rank has none."""
    config = configs.build(configs.GRPOConfig, online)
    tokenizer = run.load_tokenizer(config.model)
    rollout, _ = run.load_rollouts(config, tokenizer)
    rollout.rows, rollout.prompt_ids = rollout.rows[:1], rollout.prompt_ids[:1]
    sent = {}

    def reduce(self, tensor, reduction):
        sent.setdefault(self.process_index, []).append((tensor.dtype, tensor.shape))
        return tensor

    monkeypatch.setattr(Accelerator, "reduce", reduce)
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    trainer = GRPOTrainer(
        run.load_model(config), run.training_arguments(config), rollout=rollout, pad_id=0,
        eval_rollout=rollout,
    )  # fmt: skip
    for rank in range(2):
        monkeypatch.setattr(Accelerator, "process_index", property(lambda self, rank=rank: rank))
        trainer.evaluate()
    assert sent[0] == sent[1]
    assert len(sent[0]) == 2  # Whether it failed, and the rewards.
