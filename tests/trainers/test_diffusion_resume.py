import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from diffusion_parts import QUIET, ddpm, tensors, tiny_unet
from safetensors.torch import load_file

from fastpo.diffusion.reference_errors import StaleReferenceError
from fastpo.trainers.checkpoints import CheckpointError
from fastpo.trainers.config import ConfigError
from fastpo.trainers.diffusion import train
from fastpo.trainers.diffusion_config import DiffusionDPOConfig

PAIRS = 7
PROGRAM = """
import json, os, sys
import torch
from diffusion_parts import ddpm, tensors, tiny_unet
from fastpo.trainers import diffusion
from fastpo.trainers.diffusion_config import DiffusionDPOConfig

options, kill = json.loads(sys.argv[1]), int(sys.argv[2])
plain = diffusion.DiffusionDPOTrainer._train_step
def killed(self, batches):
    found = plain(self, batches)
    if self.step == kill:
        os._exit(9)
    return found
diffusion.DiffusionDPOTrainer._train_step = killed
torch.manual_seed(0)
rows = tensors({pairs})
diffusion.train(tiny_unet(), ddpm(), rows, DiffusionDPOConfig(**options), eval_pairs=rows)
""".replace("{pairs}", str(PAIRS))
EVERYTHING = {
    "lora": {
        "lora_r": 2, "lora_targets": "all-linear", "lora_dropout": 0.5, "ema_decay": 0.9,
        "reference": "second_adapter", "reference_steps": 3,
    },
    "cached": {"reference": "cached", "reference_draws": 2, "independent_noise": True},
}  # fmt: skip


def run(options, rows=None):
    torch.manual_seed(0)
    rows = tensors(PAIRS) if rows is None else rows
    return train(tiny_unet(), ddpm(), rows, DiffusionDPOConfig(**options), eval_pairs=rows)


def weights(output):
    (path,) = (Path(output) / "model").glob("*.safetensors")
    return load_file(path)


@pytest.fixture
def options(tmp_path):
    more = {"batch_size": 2, "accumulation": 2, "schedule": "cosine", "eval_steps": 3}
    return QUIET | more | {"output": str(tmp_path / "run")}


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERYTHING)
def test_killed_run_resumes_to_the_same_weights(options, tmp_path, name):
    """Killed after step 3, resumed from step 2 inside a pass: bitwise the uninterrupted run."""
    options |= EVERYTHING[name]
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    command = [sys.executable, "-c", PROGRAM, json.dumps(options), "3"]
    assert subprocess.run(command, env=environment, check=False).returncode == 9
    output = Path(options["output"])
    assert [p.name for p in output.glob("*checkpoint*")] == ["checkpoint-2"]
    with pytest.raises(CheckpointError, match="holds checkpoints of a run up to checkpoint-2"):
        run(options)
    with pytest.raises(ConfigError, match=r"loss_options .*20.0. -> .*3.0"):
        run(options | {"resume": True, "loss_options": {"beta": 3.0}})
    resumed = run(options | {"resume": True})
    assert resumed.steps == 4

    whole = run(options | {"output": str(tmp_path / "whole")})
    assert resumed.before == whole.before
    assert resumed.history == whole.history
    got, want = weights(output), weights(tmp_path / "whole")
    assert got.keys() == want.keys()
    for tensor in want:
        assert torch.equal(got[tensor], want[tensor]), tensor
    lines = (output / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == whole.history


def test_run_killed_in_a_save_resumes_from_the_one_before(options, tmp_path, monkeypatch):
    """What a save leaves behind counts for nothing, and goes with the next one."""
    plain = Path.rename

    def killed(path, target):
        if target.name == "checkpoint-4":
            (path / "optimizer.bin").write_bytes(b"")
            raise KeyboardInterrupt
        return plain(path, target)

    output = Path(options["output"])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            run(options)
    names = {path.name for path in output.glob("*checkpoint*")}
    assert names == {"checkpoint-2", "unfinished-checkpoint"}
    resumed = run(options | {"resume": True})
    whole = run(options | {"output": str(tmp_path / "whole")})
    assert resumed.history == whole.history
    got, want = weights(output), weights(tmp_path / "whole")
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert not (output / "unfinished-checkpoint").exists()


def test_other_inputs_are_refused_by_name(options):
    """Devices, data, and the weights of the denoiser; what was resumed is left as it was."""
    run(options | {"lora_r": 2, "lora_targets": "all-linear"})
    options |= {"lora_r": 2, "lora_targets": "all-linear", "resume": True, "max_steps": 5}
    with pytest.raises(CheckpointError, match="of a run with another data, eval_data"):
        run(options, tensors(PAIRS, seed=5))
    torch.manual_seed(0)
    rows, unet = tensors(PAIRS), tiny_unet()
    with torch.no_grad():
        next(unet.parameters()).view(-1)[1].mul_(1 + 2e-7)
    with pytest.raises(CheckpointError, match="of a run with another model"):
        train(unet, ddpm(), rows, DiffusionDPOConfig(**options), eval_pairs=rows)
    manifest = Path(options["output"]) / "checkpoint-4" / "manifest.json"
    found = json.loads(manifest.read_text())
    found["inputs"]["world_size"] = "2"
    manifest.write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match="of a run with another world_size 2 -> 1"):
        run(options)


def test_checkpoints_are_limited_and_damage_is_named(options):
    options |= {"save_steps": 1, "save_total_limit": 2, "ema_decay": 0.9}
    run(options)
    output = Path(options["output"])
    assert sorted(p.name for p in output.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    for name in ("model.safetensors", "optimizer.bin", "changing.pt"):
        path = output / "checkpoint-4" / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match=rf"{name}: damaged.*--resume-from checkpoint-3"):
            run(options | {"resume": True})
        path.write_bytes(whole)
    (output / "checkpoint-4" / "optimizer.bin").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer.bin: missing"):
        run(options | {"resume": True})
    assert run(options | {"resume_from": "checkpoint-3", "max_steps": 5}).steps == 5


def test_cached_errors_of_other_data_are_refused(options):
    options |= {"reference": "cached", "max_steps": 1, "save_steps": 100}
    run(options)
    (Path(options["output"]) / "checkpoint-1").rename(Path(options["output"]) / "elsewhere")
    with pytest.raises(StaleReferenceError, match="made with another data"):
        run(options | {"max_steps": 2}, tensors(PAIRS, seed=5))
