import json
import math
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastpo.trainers import config as configs
from fastpo.trainers import run


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["cached", "copy"])
def test_two_ranks_give_the_weights_of_one(options, tmp_path, reference):
    """Gradients are reduced through the fused head, whatever was computed before training."""
    options |= {"reference": reference, "eval_share": 0.25}
    run.train_dpo(configs.build(configs.DPOConfig, options))
    config = tmp_path / "run.yaml"
    two = options | {"output": str(tmp_path / "two"), "batch_size": options["batch_size"] // 2}
    config.write_text(yaml.safe_dump(two))
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 -m fastpo train dpo"
    done = subprocess.run(
        [sys.executable, *command.split(), "--config", str(config)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    got, want = (load_file(f"{o['output']}/model.safetensors") for o in (two, options))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=2e-5, msg=name)


RECIPE = """
import sys
import torch
from tiny_rows import make_pairs
from test_recipes import QUIET, SGD
from transformers import AutoModelForCausalLM
from fastpo import recipes
from fastpo.trainers import run

def letters(prompts, responses):  # No ties: as many rows as prompts, which the ranks share out.
    return torch.tensor([[float(sum(map(ord, r))) for r in group] for group in responses])

folder, output, batch = sys.argv[1:]
training = QUIET | SGD | {"learning_rate": 0.1, "per_device_train_batch_size": int(batch)}
recipes.iterative_dpo(
    AutoModelForCausalLM.from_pretrained(folder), run.load_tokenizer(folder), make_pairs(8),
    letters, output=output, rounds=2, samples=4, max_new_tokens=6, sample_batch_size=4,
    training=training,
)
run.leave_ranks()
"""


@pytest.mark.slow
def test_two_ranks_sample_and_train_as_one(model_folder, tmp_path):
    """Responses are shared out among ranks, scored once, and put together in their order."""
    script = tmp_path / "recipe.py"
    script.write_text(RECIPE)
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    for name, start, batch in (
        ("one", [], 2),
        ("two", "-m torch.distributed.run --standalone --nproc-per-node 2".split(), 1),
    ):
        done = subprocess.run(
            [sys.executable, *start, script, model_folder, tmp_path / name, str(batch)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    one, two = tmp_path / "one", tmp_path / "two"
    for part in sorted(one.glob("round-*/*samples*")):
        assert torch.load(part) == torch.load(two / part.relative_to(one))
    got, want = (load_file(folder / "model" / "model.safetensors") for folder in (two, one))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=2e-5, msg=name)


UNEVEN = """
import json, os, sys
from pathlib import Path
import torch
from grpo_parts import make_groups
from tiny_rows import make_pairs, write_jsonl
from fastpo import losses
from fastpo.data.records import PAIR_FIELDS, load_rows
from fastpo.data.tokens import PairCollator, tokenize_rows
from fastpo.trainers import config as configs, run
from fastpo.trainers.dpo import DPOTrainer

model, folder = sys.argv[1], Path(sys.argv[2])
rank = int(os.environ["RANK"])
base = {
    "model": model, "max_length": 64, "tensorboard": False, "save_steps": 100, "logging_steps": 1,
    "batch_size": 1, "warmup_steps": 0, "trainer": {"use_cpu": True, "disable_tqdm": True},
}
prompts = [{"prompt": pair["prompt"]} for pair in make_pairs(5)]
found = run.train_grpo(configs.build(
    configs.GRPOConfig, base,
    {
        "data": write_jsonl(folder / f"{rank}-train.jsonl", prompts[:4]), "max_steps": 2,
        "eval_data": write_jsonl(folder / f"{rank}-held.jsonl", prompts[4:]),
        "output": str(folder / "grpo"), "reward": "grpo_parts:vowels", "samples": 2,
        "max_new_tokens": 4, "advantage": "dgpo",
    },
))
rewards = [found[when]["eval_rewards/mean"] for when in ("before", "after")]
# Of given groups every second one teaches nothing: a rank may have no completion that counts.
rows = make_groups(4)
for row in rows[::2]:
    row["rewards"] = [1.0] * 3
run.train_grpo(configs.build(
    configs.GRPOConfig, base,
    {
        "data": write_jsonl(folder / f"{rank}-groups.jsonl", rows), "output": str(folder / "given"),
        "eval_share": 0.0, "filter_groups": True, "max_steps": 2,
    },
))

def loss(policy_chosen: torch.Tensor, policy_rejected: torch.Tensor):
    out = losses.dpo(policy_chosen, policy_rejected, policy_rejected, policy_chosen)
    return out._replace(metrics={f"of_rank_{rank}": torch.tensor(2.0 + rank)})

tokenizer = run.load_tokenizer(model)
pairs = write_jsonl(folder / f"{rank}-pairs.jsonl", make_pairs(4))
rows, _ = tokenize_rows(load_rows(pairs, PAIR_FIELDS), PAIR_FIELDS, tokenizer, 64)
config = configs.build(
    configs.DPOConfig, base, {"data": pairs, "output": str(folder / "dpo"), "max_steps": 2}
)
trainer = DPOTrainer(
    run.load_model(config), run.training_arguments(config), loss=loss,
    data_collator=PairCollator(tokenizer.pad_token_id), train_dataset=rows.select(range(3)),
    eval_dataset=rows.select([3]),
)
trainer.train()
logged = [log for log in trainer.state.log_history if "loss" in log]
held = trainer.evaluate()["eval_rewards/margins"]
metrics = [[log["of_rank_0"], log["of_rank_1"]] for log in logged]
told = {"rewards": rewards, "metrics": metrics, "held": held}
(folder / f"rank{rank}.json").write_text(json.dumps(told))
run.leave_ranks()
"""


@pytest.mark.slow
def test_ranks_may_have_less_than_others(model_folder, tmp_path):
    """One held-out prompt or pair, batches without a token that counts, metrics of one rank."""
    script = tmp_path / "uneven.py"
    script.write_text(UNEVEN)
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    start = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    done = subprocess.run(
        [sys.executable, *start, script, model_folder, tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert one == two
    assert all(reward > 0 for reward in one["rewards"])
    assert one["metrics"] == [[2.0, 3.0]] * 2
    assert math.isfinite(one["held"])
