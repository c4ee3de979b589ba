import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from killed_runs import killed_program
from safetensors.torch import load_file, save_file

from fastpo.cli import main
from fastpo.trainers import base, run
from fastpo.trainers import config as configs
from fastpo.trainers.checkpoints import CheckpointError, locked, problem, resume_point
from fastpo.trainers.dpo import DPOTrainer
from fastpo.trainers.reference import ReferenceCacheError
from fastpo.trainers.stops import Signals

KILLED = killed_program("train_dpo", "DPOConfig", step=3)


def dpo(*sources):
    return run.train_dpo(configs.build(configs.DPOConfig, *sources))


def test_killed_run_resumes_to_the_same_weights(options, tmp_path):
    """Killed after step 3, resumed from step 2: bitwise the uninterrupted run."""
    options |= {"reference": "cached"}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(options))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert killed.returncode == 9
    output = Path(options["output"])
    assert [p.name for p in output.glob("checkpoint-*")] == ["checkpoint-2"]
    with pytest.raises(CheckpointError, match="holds checkpoints of a run up to checkpoint-2"):
        dpo(options)
    with pytest.raises(configs.ConfigError, match="beta None -> 0"):
        dpo(options, {"resume": True, "beta": 0.5})
    cache = (output / "train_reference_logprobs.safetensors").stat().st_mtime_ns
    resumed = dpo(options, {"resume": True})
    assert resumed["steps"] == 4
    assert resumed["before"]["eval_loss"] > resumed["after"]["eval_loss"]
    assert (output / "train_reference_logprobs.safetensors").stat().st_mtime_ns == cache

    whole = tmp_path / "whole"
    dpo(options, {"output": str(whole)})
    got, want = (load_file(folder / "model.safetensors") for folder in (output, whole))
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_changed_model_or_data_refuses_the_cache(options, tmp_path):
    options |= {"reference": "cached", "max_steps": 1, "save_steps": 100}
    dpo(options)
    output = Path(options["output"])
    shutil.rmtree(output / "checkpoint-1")
    with pytest.raises(ReferenceCacheError, match="another data"):
        dpo(options, {"limit": 20})
    (output / "train_reference_logprobs.safetensors").write_bytes(b"short")
    with pytest.raises(ReferenceCacheError, match="damaged"):
        dpo(options)


@pytest.fixture(scope="module")
def finished(model_folder, pairs_file, tmp_path_factory):
    """A run with the checkpoints 2 and 4."""
    output = tmp_path_factory.mktemp("finished") / "run"
    dpo(
        {
            "model": model_folder, "data": pairs_file, "output": str(output), "batch_size": 2,
            "max_steps": 4, "save_steps": 2, "eval_share": 0.0, "tensorboard": False,
            "trainer": {"disable_tqdm": True, "use_cpu": True},
        }
    )  # fmt: skip
    return output


def test_damage_of_any_file_is_named(finished, tmp_path):
    """Cut short, one bit turned over, taken away: by every file of a checkpoint."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    files = sorted(path for path in (output / "checkpoint-4").rglob("*") if path.is_file())
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth"} <= {path.name for path in files}
    assert "training_args.bin" not in {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        turned = bytearray(content)
        turned[len(turned) // 2] ^= 1
        for damaged in (content[: len(content) // 2], bytes(turned), None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            if path.name == "manifest.json" and damaged == bytes(turned):
                match = r"checkpoint-4/"  # its own bits are what the others are held against
            else:
                match = rf"checkpoint-4/{path.name}: (damaged or cut short|missing)"
            with pytest.raises(CheckpointError, match=rf"{match}.*--resume-from checkpoint-2"):
                resume_point(output, resume=True, resume_from=None)
            said = []
            assert resume_point(output, "auto", None, said.append) == output / "checkpoint-2"
            assert path.name in said[0] or damaged == bytes(turned)
            path.write_bytes(content)
    assert resume_point(output, True, None) == output / "checkpoint-4"
    assert resume_point(output, False, "checkpoint-2") == output / "checkpoint-2"


def test_auto_begins_anew_and_leaves_out_what_was_not_finished(finished, tmp_path):
    said, output = [], tmp_path / "run"
    assert resume_point(output, "auto", None, said.append) is None
    assert said == []
    shutil.copytree(finished, output)
    (output / "checkpoint-4" / "manifest.json").unlink()
    assert resume_point(output, "auto", None, said.append) == output / "checkpoint-2"
    shutil.rmtree(output / "checkpoint-2")
    assert resume_point(output, "auto", None, said.append) is None
    assert ["not finished" in line for line in said] == [True, True]
    shutil.rmtree(output / "checkpoint-4")
    shutil.copytree(finished / "checkpoint-4", output / "checkpoint-4")
    (output / "checkpoint-4" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"damaged.* No checkpoint is whole"):
        resume_point(output, "auto", None)


def test_killed_in_a_save_goes_on_from_the_one_before(options, tmp_path, monkeypatch):
    """The last files of checkpoint 4 were not written; `--resume auto` makes it again."""

    def killed(checkpoint, inputs):
        if checkpoint.name == "checkpoint-4":
            (checkpoint / "optimizer.pt").write_bytes(b"")
            raise InterruptedError
        seal(checkpoint, inputs)

    seal = base.seal
    with monkeypatch.context() as patch:
        patch.setattr(base, "seal", killed)
        with pytest.raises(InterruptedError):
            dpo(options)
    output = Path(options["output"])
    assert dpo(options, {"resume": "auto"})["steps"] == 4
    assert problem(output / "checkpoint-4") == ""
    whole = tmp_path / "whole"
    dpo(options, {"output": str(whole), "resume": "auto"})
    got, want = (load_file(folder / "model.safetensors") for folder in (output, whole))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_other_inputs_are_refused_by_name(options, tmp_path):
    """By paths that stay: data, held-out data, tokenizer, template, weights, config, ranks."""
    model, data, held = tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "held.jsonl"
    shutil.copytree(options["model"], model)
    shutil.copy(options["data"], data)
    shutil.copy(options["data"], held)
    options |= {"model": str(model), "data": str(data), "eval_data": str(held), "max_steps": 2}
    dpo(options)

    def weights():
        tensors = load_file(model / "model.safetensors")
        tensors["model.norm.weight"][3] += 1e-6
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    def text(path, old, new):
        changed = path.read_text().replace(old, new)
        assert changed != path.read_text()
        path.write_text(changed)

    changes = {
        "data": lambda: text(data, "blue", "green"),
        "eval_data": lambda: text(held, "blue", "green"),
        "tokenizer": lambda: (model / "chat_template.jinja").write_text("{{ messages }}"),
        "model": weights,
        "model_config": lambda: text(model / "config.json", "1e-06", "1e-05"),
        "world_size 3 -> 1": lambda: text(
            Path(options["output"]) / "checkpoint-2" / "manifest.json",
            '"world_size": "1"', '"world_size": "3"',
        ),
    }  # fmt: skip
    for name, change in changes.items():
        kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        change()
        with pytest.raises(CheckpointError, match=rf"of a run with another {name}\."):
            dpo(options, {"resume": True, "max_steps": 3})
        (model / "chat_template.jinja").unlink(missing_ok=True)
        for path, content in kept.items():
            path.write_bytes(content)
    assert dpo(options, {"resume": True, "max_steps": 3})["steps"] == 3


def test_two_runs_in_one_folder(options, tmp_path):
    """The second is refused by name; the lock of one that was killed is free."""
    with locked(options["output"]), pytest.raises(CheckpointError, match="another run is writing"):
        dpo(options)
    code = "import os, sys; from fastpo.trainers.checkpoints import locked\n"
    code += "with locked(sys.argv[1]): os._exit(9)"
    killed = subprocess.run([sys.executable, "-c", code, options["output"]], check=False)
    assert killed.returncode == 9
    with locked(options["output"]):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_its_code(options, tmp_path, monkeypatch, capsys, number):
    """In the middle of step 3; the rest gives the weights of a run that was not stopped."""
    plain, handlers = DPOTrainer.compute_loss, [signal.getsignal(n) for n in Signals.NUMBERS]

    def interrupted(self, *arguments, **more):
        if self.model.training and self.state.global_step == 2:
            signal.raise_signal(number)
        return plain(self, *arguments, **more)

    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(options | {"save_steps": 100}))
    with monkeypatch.context() as patch:
        patch.setattr(DPOTrainer, "compute_loss", interrupted)
        with pytest.raises(SystemExit) as stopped:
            main(["train", "dpo", "--config", str(path)])
    assert stopped.value.code == 128 + number
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"fastpo: {number.name}: stopped")
    assert [signal.getsignal(n) for n in Signals.NUMBERS] == handlers
    output = Path(options["output"])
    assert [p.name for p in output.glob("checkpoint-*")] == ["checkpoint-3"]
    main(["train", "dpo", "--config", str(path), "--resume"])
    whole = tmp_path / "whole"
    main(["train", "dpo", "--config", str(path), "--output", str(whole)])
    got, want = (load_file(folder / "model.safetensors") for folder in (output, whole))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_whole_checkpoints_and_nothing_to_resume(finished, tmp_path):
    assert problem(finished / "checkpoint-4") == ""
    assert resume_point(finished, True, None).name == "checkpoint-4"
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        resume_point(tmp_path, resume=True, resume_from=None)
    history = json.loads((finished / "checkpoint-4" / "trainer_state.json").read_text())
    assert history["global_step"] == 4
