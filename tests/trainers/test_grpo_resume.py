"""Killed and resumed, on two ranks, by the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from grpo_parts import write_groups
from killed_runs import killed_program
from safetensors.torch import load_file
from test_grpo import ONLINE, SGD, grpo, weights
from tiny_rows import make_pairs, write_jsonl

KILLED = killed_program("train_grpo", "GRPOConfig", step=7)


def python(*arguments):
    """A program that finds the tests' reward functions."""
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def prompts(tmp_path):
    rows = [{"prompt": pair["prompt"], "bonus": i} for i, pair in enumerate(make_pairs(6))]
    return write_jsonl(tmp_path / "prompts.jsonl", rows)


def test_killed_run_resumes_to_the_same_weights(options, prompts, tmp_path):
    """Killed inside the second generation, in another epoch: bitwise the uninterrupted run."""
    options |= ONLINE | {
        "data": prompts, "eval_share": 0.0, "batch_size": 1, "accumulation": 2, "max_steps": 12,
        "steps_per_generation": 2, "num_iterations": 2, "save_steps": 4, "lora_r": 0, "beta": 0.1,
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(options))
    killed = python("-c", KILLED, path)
    assert killed.returncode == 9, killed.stderr
    assert [p.name for p in Path(options["output"]).glob("checkpoint-*")] == ["checkpoint-4"]
    assert grpo(options, {"resume": True})["steps"] == 12
    whole = options | {"output": str(tmp_path / "whole")}
    grpo(whole)
    got, want = weights(options), weights(whole)
    start = load_file(Path(options["model"]) / "model.safetensors")
    for name in want:
        assert torch.equal(got[name], want[name]), name
    assert any(not torch.equal(want[name], start[name]) for name in want)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        {"loss": "dapo", "beta": 0.1},
        {"loss": "grpo", "advantage": "bnpo"},
        {"loss": "dr_grpo", "max_length": 24},
        {"lora_r": 2},
    ],
)
def test_two_ranks_give_the_weights_of_one(options, tmp_path, kind):
    """Tokens, sequences and the batch of the advantages are counted over both ranks."""
    data = write_groups(tmp_path / "groups.jsonl", 8, sizes=(3, 2, 4))
    options |= kind | {"data": data, "eval_share": 0.0, "batch_size": 4, "learning_rate": 0.1}
    options |= {"max_steps": 2, "schedule": "constant"}
    options["trainer"] = options["trainer"] | SGD["trainer"]
    assert_two_ranks_give_the_weights_of_one(options, tmp_path)


@pytest.mark.slow
def test_two_ranks_sample_as_one(options, prompts, tmp_path):
    options |= ONLINE | SGD | {
        "data": prompts, "eval_share": 0.3, "batch_size": 2, "learning_rate": 0.1, "max_steps": 2,
        "steps_per_generation": 2,
    }  # fmt: skip
    options["trainer"] = {"use_cpu": True, "disable_tqdm": True} | SGD["trainer"]
    assert_two_ranks_give_the_weights_of_one(options, tmp_path)
    one, two = (
        json.loads((Path(folder) / "results.json").read_text())
        for folder in (options["output"], tmp_path / "two")
    )
    assert two["before"]["eval_rewards/mean"] == pytest.approx(one["before"]["eval_rewards/mean"])


def assert_two_ranks_give_the_weights_of_one(options, tmp_path):
    grpo(options)
    config = tmp_path / "run.yaml"
    two = options | {"output": str(tmp_path / "two"), "batch_size": options["batch_size"] // 2}
    config.write_text(yaml.safe_dump(two))
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 -m fastpo train grpo"
    done = python(*command.split(), "--config", config)
    assert done.returncode == 0, done.stderr
    name = "adapter_model.safetensors" if options.get("lora_r") else "model.safetensors"
    got, want = (load_file(f"{o['output']}/{name}") for o in (two, options))
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-3, atol=2e-5, msg=key)
    assert max(w.abs().max() for w in want.values()) > 0


def test_command_line(model_folder, tmp_path, capsys):
    """The commands of a run on given groups and of one that samples."""
    from fastpo.cli import main

    data = write_groups(tmp_path / "groups.jsonl", 4)
    shared = (
        *("train", "grpo", "--model", model_folder, "--data", data, "--no-tensorboard"),
        *("--batch-size", "2", "--max-steps", "1"),
        *("--trainer", "use_cpu=true", "--trainer", "disable_tqdm=true"),
    )

    def fastpo(name, *flags):
        main([*shared, "--output", str(tmp_path / name), *flags])
        return capsys.readouterr().out

    printed = fastpo("given", "--loss-options", "clip_high=0.3")
    assert "train: 4 groups, 12 completions, 0 groups of equal rewards" in printed
    assert "'rewards/mean'" in printed
    sampled = ("--reward", "grpo_parts:vowels", "--samples", "2", "--max-new-tokens", "4")
    printed = fastpo("sampled", *sampled, "--eval-share", "0.3", "--advantage-options", "ddof=0")
    assert "eval_rewards/mean" in printed
    with pytest.raises(SystemExit, match=r"^fastpo: loss or advantage: .*method: expected one of"):
        fastpo("wrong", "--advantage", "gae")
