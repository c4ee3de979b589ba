"""No file of a run is unpickled beyond tensors and plain containers, whatever stands in it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusion_parts import QUIET, ddpm, tensors, tiny_unet
from grpo_parts import write_groups

from fastpo import recipes
from fastpo.diffusion.reference_errors import StaleReferenceError
from fastpo.trainers import run
from fastpo.trainers.checkpoints import CheckpointError, checkpoints, is_pickle, problem, seal
from fastpo.trainers.config import DPOConfig, GRPOConfig, SFTConfig, build
from fastpo.trainers.diffusion import train
from fastpo.trainers.diffusion_config import DiffusionDPOConfig
from fastpo.trainers.reference import ReferenceCacheError
from fastpo.trainers.states import StateError

REFUSALS = (CheckpointError, StaleReferenceError, ReferenceCacheError, StateError)
# Names that libraries would read if they were there.
FOREIGN = ("pytorch_model.bin", "adapter_model.bin", "custom_checkpoint_0.pkl", "scaler.pt")


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def dpo(options, resume):
    more = {"reference": "cached", "lora_r": 2, "resume": resume, "max_steps": 3 + resume}
    run.train_dpo(build(DPOConfig, options, more))


def sft(options, resume):
    run.train_sft(build(SFTConfig, options, {"resume": resume, "max_steps": 3 + resume}))


def grpo(options, resume):
    more = {"beta": 0.1, "eval_share": 0.0, "resume": resume, "max_steps": 3 + resume}
    run.train_grpo(build(GRPOConfig, options, more))


def diffusion(options, resume):
    more = {
        "output": options["output"], "reference": "second_adapter", "reference_steps": 3,
        "lora_r": 2, "lora_targets": "all-linear", "ema_decay": 0.9, "max_steps": 3 + resume,
        "resume": resume,
    }  # fmt: skip
    torch.manual_seed(0)
    train(tiny_unet(), ddpm(), tensors(4), DiffusionDPOConfig(**QUIET | more))


def diffusion_cached(options, resume):
    more = {"output": options["output"], "reference": "cached", "resume": resume, "max_steps": 2}
    torch.manual_seed(0)
    train(tiny_unet(), ddpm(), tensors(4), DiffusionDPOConfig(**QUIET | more))


KINDS = {
    "dpo": dpo, "sft": sft, "grpo": grpo, "diffusion": diffusion, "cached": diffusion_cached,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_payload_is_refused_in_every_file_of_a_run(kind, options, completions_file, tmp_path):
    """Planted as a pickle and as an archive, with and without a manifest that fits it."""
    if kind == "sft":
        options |= {"data": completions_file}
    if kind == "grpo":
        options |= {"data": write_groups(tmp_path / "groups.jsonl", 8)}
    KINDS[kind](options, resume=False)
    output = Path(options["output"])
    last = checkpoints(output)[-1]
    for old in checkpoints(output)[:-1]:
        shutil.rmtree(old)
    assert problem(last) == ""
    kept = [path for path in output.rglob("*") if path.is_file()]
    planted = [p for p in kept if is_pickle(p) or "reference" in p.name]
    assert {path.parent for path in planted} <= {last, output}
    if kind == "sft":  # one kind shows it for all
        planted += [last / name for name in FOREIGN]
    mark, seen = tmp_path / "executed", set()
    for path in planted:
        whole = path.read_bytes() if path.exists() else None
        manifest = (last / "manifest.json").read_bytes()
        for is_archive in (True, False)[: 1 + (path.parent == last)]:
            torch.save(Payload(mark), path, _use_new_zipfile_serialization=is_archive)
            for is_sealed in (False, True)[: 1 + (path.parent == last)]:
                if is_sealed:
                    seal(last, {})
                with pytest.raises(REFUSALS) as refused:
                    KINDS[kind](options, resume=True)
                assert str(path) in str(refused.value)
                assert "\n" not in str(refused.value)
                assert not mark.exists()
                seen.add(path.name)
                (last / "manifest.json").write_bytes(manifest)
        path.unlink() if whole is None else path.write_bytes(whole)
    assert seen
    KINDS[kind](options, resume=True)


def test_a_payload_is_refused_in_every_file_of_a_recipe(start, tmp_path):
    start(recipes.raft, rounds=1, fraction=0.5)
    output, mark, whole = tmp_path / "run", tmp_path / "executed", tmp_path / "whole"
    names = json.loads((output / "states" / "states.json").read_text())["names"]
    # As if it had been interrupted at the end of another round.
    shutil.copytree(output / "round-0", output / "round-1")
    shutil.copytree(output, whole)
    kept = [*output.glob("round-1/*.pt"), output / "states" / "states.json"]
    kept += [output / "states" / f"{names['latest']}.safetensors"]
    assert len(kept) == 5
    for path in kept:
        shutil.rmtree(output)
        shutil.copytree(whole, output)
        torch.save(Payload(mark), path)
        with pytest.raises(REFUSALS, match=rf"^{path}: [^\n]*$"):
            start(recipes.raft, rounds=2, fraction=0.5, resume=True)
        assert not mark.exists()
