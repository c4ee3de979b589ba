import copy
import json
import math
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("diffusers")

from accelerate.state import AcceleratorState
from diffusers import (
    DDPMPipeline,
    UNet2DModel,
)
from diffusion_parts import (
    FAMILIES,
    QUIET,
    ddpm,
    family,
    flow,
    tensors,
    tiny_unet,
)
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny_rows import write_jsonl
from tolerance import assert_close_to_truth
from torch.nn.functional import logsigmoid

from fastpo.data.errors import DataError
from fastpo.diffusion.reference_errors import fixed_draws
from fastpo.trainers.config import ConfigError
from fastpo.trainers.diffusion import DiffusionDPOTrainer, train
from fastpo.trainers.diffusion_config import DiffusionDPOConfig
from fastpo.trainers.diffusion_data import Encoder, PairOrder, Rows, read_pairs
from fastpo.trainers.diffusion_samples import grid, sample

LOG2 = math.log(2)
LORA = {"lora_r": 2, "lora_targets": "all-linear"}


@pytest.fixture
def fresh_accelerator():
    """Accelerate holds the precision of the first run in a process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.fixture
def start(tmp_path):
    """A run on the tiny UNet: its result and its weights."""

    def run(rows=None, eval_rows=None, scheduler=None, **options):
        torch.manual_seed(0)
        options = (
            QUIET | {"output": str(tmp_path / f"run{len(list(tmp_path.iterdir()))}")} | options
        )
        rows = tensors(8) if rows is None else rows
        config = DiffusionDPOConfig(**options)
        result = train(tiny_unet(), scheduler or ddpm(), rows, config, eval_pairs=eval_rows)
        return result, {n: p.detach().clone() for n, p in result.denoiser.named_parameters()}

    return run


def plain_steps(rows, steps, beta, dtype):
    """The same training in plain torch: add_noise, mean squares, logsigmoid, AdamW."""
    torch.manual_seed(0)
    model, scheduler, seed = tiny_unet().to(dtype), ddpm(), QUIET["seed"]
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=QUIET["learning_rate"], weight_decay=0.0)
    order = iter(PairOrder(len(rows), QUIET["batch_size"], seed))
    losses = []
    for step in range(steps):
        index = next(order)
        draws = fixed_draws(seed, index, (1, 8, 8), draw=2 * (step * len(index) // len(rows)))
        errors = []
        for side in ("chosen", "rejected"):
            noisy = scheduler.add_noise(
                rows.tensors[side][index].to(dtype), draws.noise.to(dtype),
                (draws.uniforms * scheduler.config.num_train_timesteps).long(),
            )  # fmt: skip
            timesteps = (draws.uniforms * scheduler.config.num_train_timesteps).long()
            for net in (model, reference):
                error = (net(noisy, timesteps).sample - draws.noise).square().mean((1, 2, 3))
                errors.append(error if net is model else error.detach())
        chosen, ref_chosen, rejected, ref_rejected = errors
        margin = (rejected - ref_rejected) - (chosen - ref_chosen)
        loss = -logsigmoid(0.5 * beta * margin).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {n: p.detach() for n, p in model.named_parameters()}


def test_steps_are_those_of_plain_torch(start):
    """Losses and weights after steps of two passes over the data."""
    rows, steps, beta = tensors(8), 3, QUIET["loss_options"]["beta"]
    result, weights = start(rows, max_steps=steps)
    truth_losses, truth = plain_steps(rows, steps, beta, torch.float64)
    base_losses, base = plain_steps(rows, steps, beta, torch.float32)
    got = [line["loss"] for line in result.history]
    assert_close_to_truth(*map(torch.tensor, (got, truth_losses, base_losses)), what="losses")
    for name in truth:
        assert_close_to_truth(weights[name], truth[name], base[name], what=name)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("lora", [{}, LORA])
def test_every_family_learns_its_pairs(tmp_path, name, lora):
    model, scheduler, rows = family(name)
    config = DiffusionDPOConfig(**QUIET | lora | {"output": str(tmp_path)})
    result = train(model, scheduler, rows, config, eval_pairs=rows)
    # The model is its reference at first.
    assert result.before["loss"] == pytest.approx(LOG2)
    assert result.after["loss"] < result.before["loss"]
    if lora:
        saved = PeftModel.from_pretrained(family(name)[0], tmp_path / "model")
    else:
        saved = type(model).from_pretrained(tmp_path / "model")
    state = result.denoiser.state_dict()
    for key, tensor in saved.state_dict().items():
        assert torch.equal(tensor, state[key]), key


@pytest.mark.parametrize(
    "options",
    [
        {"one_at_a_time": True},
        {"reference": "cached"},
        {"batch_size": 2, "accumulation": 2},
        {"batch_size": 2, "accumulation": 2, "one_at_a_time": True},
        {"gradient_checkpointing": True},
    ],
)
def test_ways_to_the_same_gradient(tmp_path, options):
    """What saves memory or time changes the rounding alone."""
    more = {"independent_noise": True, "seed": 3}
    want, got = (gradient(tmp_path / name, more | o) for name, o in (("a", {}), ("b", options)))
    scale = max(grad.abs().max() for grad in want.values())
    for name in want:
        torch.testing.assert_close(got[name] / scale, want[name] / scale, msg=name)


def gradient(output, options):
    """Of a step on four pairs, of a model that left its reference."""
    torch.manual_seed(0)
    config = DiffusionDPOConfig(**QUIET | options | {"output": str(output)})
    trainer = DiffusionDPOTrainer(tiny_unet(), ddpm(), tensors(8), config)
    if config.reference == "cached":
        trainer.errors.keep_reference_errors(trainer.pairs, output / "table.pt", 1)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.trainable:
            parameter += 0.01 * torch.randn(parameter.shape)
    batches = trainer.errors.batches(trainer.pairs, trainer.order)
    for _ in range(config.accumulation):
        trainer.errors.backward(trainer.pairs, next(batches), 0)
    return {n: p.grad.clone() for n, p in trainer.denoiser.named_parameters()}


def tiny_unet_weights():
    torch.manual_seed(0)
    return dict(tiny_unet().named_parameters())


def test_independent_noise_and_seeds_change_the_draws(start):
    plain, *others = (
        start(max_steps=1, **o)[0].history[0]["errors/rejected"]
        for o in ({}, {"independent_noise": True}, {"seed": 2})
    )
    assert len({plain, *others}) == 3


@pytest.mark.parametrize("loss", ["ipo", "hinge", "mapo", "orpo", "cpo"])
def test_losses_are_called_by_name(start, loss):
    result, _ = start(tensors(8), tensors(4), loss=loss, loss_options={}, beta=1.0)
    assert result.after["loss"] < result.before["loss"]
    assert ("errors/ref_chosen" in result.after) == (loss in ("ipo", "hinge"))


def test_weights_of_pairs_go_to_the_loss(start):
    rows = tensors(8)
    rows.tensors["weights"] = torch.zeros(8)
    _, weights = start(rows)
    assert all(torch.equal(p, weights[n]) for n, p in tiny_unet_weights().items())


def test_conditions_of_each_side(start, tmp_path):
    """Swapped labels change the errors of the sides as swapped models would."""
    torch.manual_seed(0)
    model, rows = tiny_unet(num_class_embeds=2), tensors(4)
    labels = torch.tensor([0, 1, 0, 1])
    found = []
    for chosen, rejected in ((labels, labels), (labels, 1 - labels)):
        given = {"chosen_class_labels": chosen, "rejected_class_labels": rejected}
        config = DiffusionDPOConfig(**QUIET | {"output": str(tmp_path / str(len(found)))})
        trainer = DiffusionDPOTrainer(
            copy.deepcopy(model), ddpm(), Rows(rows.tensors | given), config, rows_with(rows, given)
        )
        found.append(trainer.evaluate())
    assert found[0]["errors/chosen"] == found[1]["errors/chosen"]
    assert found[0]["errors/rejected"] != found[1]["errors/rejected"]
    half = Rows(rows.tensors | {"chosen_class_labels": labels})
    with pytest.raises(DataError, match="rejected_class_labels is not"):
        start(half)


def rows_with(rows, given):
    return Rows(rows.tensors | given)


def test_averaged_weights_are_saved_and_may_be_the_reference(start, tmp_path):
    steps = {"max_steps": 3, "save_steps": 1, "save_total_limit": 3, "ema_decay": 0.15}
    result, averaged = start(**steps, output=str(tmp_path / "run"))
    assert result.history == start(**steps | {"ema_decay": 0.0})[0].history
    average = {}
    # The decay begins at 0 and rises as (1 + n) / (10 + n) up to that of the options.
    for step, decay in ((1, 0.0), (2, 0.15), (3, 0.15)):
        weights = load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors")
        for name, tensor in weights.items():
            average[name] = torch.lerp(tensor, average.get(name, tensor), decay)
    for name, tensor in averaged.items():
        torch.testing.assert_close(tensor, average[name], msg=name)
    follows, _ = start(**steps, reference="ema")
    assert follows.history[1] != result.history[1]


def test_second_adapter_follows(start):
    options = LORA | {"reference": "second_adapter", "max_steps": 2}
    still, _ = start(**options)
    follows, _ = start(**options, reference_steps=1)
    adapter, _ = start(**LORA, max_steps=2)
    assert still.history == adapter.history
    assert still.history[1]["rewards/chosen"] != 0
    assert follows.history[1]["rewards/chosen"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "dppo"}, "loss: expected one of .*dpo.*got 'dppo'"),
        ({"schedule": "cosin"}, "schedule: no such schedule as 'cosin'; did you mean cosine"),
        ({"loss_options": {"bet": 1}}, "bet: the loss dpo has no such option; did you mean beta"),
        ({"loss": "dense_dpo"}, "loss: expected one of .*smpo, got 'dense_dpo'"),
        ({"reference": "none"}, "dpo needs ref_chosen_errors. Set reference"),
        ({"reference": "copy", "loss": "mapo"}, "the loss mapo has none"),
        (
            {"reference_steps": 2, "loss": "mapo", "loss_options": {}},
            "reference_steps: the loss mapo has no reference",
        ),
        ({"mixed_precision": "fp16"}, "fp16 needs a GPU"),
        ({"logit_mean": 1.0}, "logit_mean: it is of timestep_density logit_normal"),
        ({"reference_draws": 2}, "reference_draws: it is of reference cached"),
        ({"schedule": "sine", "loss_options": {}}, "schedule: .*sine"),
        ({"reference": "adapter"}, "needs a LoRA"),
        ({"reference": "ema"}, "set ema_decay"),
        ({"reference": "other"}, "reference: expected one of auto"),
        ({"reference": "cached", "reference_steps": 2}, "cached stays as it is"),
        ({"batch_size": 0}, "batch_size: expected 1 or more"),
        ({"batch_size": 16}, "8 pairs to train on, 16 in a batch"),
        ({"schedule": "constant", "warmup_steps": 2}, "constant has no warm-up"),
        ({"resume": True, "resume_from": "a"}, "give one of them"),
        ({"output": ""}, "output: missing"),
        ({"ema_decay": 1.0}, "ema_decay: expected a number in"),
        ({"mixed_precision": "fp8"}, "mixed_precision: expected one of"),
    ],
)
def test_options_that_do_not_fit_are_named(start, options, message, fresh_accelerator):
    with pytest.raises(ConfigError, match=message):
        start(**options)


@pytest.mark.parametrize("options", [{}, LORA])
def test_denoisers_with_a_lora_are_refused(tmp_path, options):
    """Its base would be trained as well, or two of them at once."""
    model, scheduler, rows = family("unet_condition")
    model.add_adapter(LoraConfig(target_modules=["to_q"]))
    config = DiffusionDPOConfig(**QUIET | options | {"output": str(tmp_path)})
    with pytest.raises(ConfigError, match="it has a LoRA already"):
        train(model, scheduler, rows, config)


def test_rows_that_do_not_fit_are_named(start, tmp_path):
    rows = tensors(4)
    rows.tensors["rejected"] = rows.tensors["rejected"][:, :, :4]
    with pytest.raises(DataError, match=r"one shape \[C, H, W\], got \[1, 8, 8\] and \[1, 4, 8\]"):
        start(rows)
    bytes_ = Rows({name: tensor.to(torch.uint8) for name, tensor in tensors(4).tensors.items()})
    with pytest.raises(DataError, match=r"chosen: expected floats, .*got torch.uint8"):
        start(bytes_)
    (tmp_path / "a.png").write_bytes(b"no image")
    for row, message in (
        ({"chosen": "a.png", "rejected": "b.png"}, "line 1: field 'rejected': there is no file"),
        ({"chosen": "a.png"}, "line 1: field 'rejected' is missing"),
        ({"chosen": "a.png", "rejected": 3}, "field 'rejected': expected str"),
        ({"chosen": "a.png", "rejected": "b.png", "class_label": "1"}, "expected int, got '1'"),
    ):
        with pytest.raises(DataError, match=message):
            read_pairs(write_jsonl(tmp_path / "rows.jsonl", [row]))
    (tmp_path / "b.png").write_bytes(b"nor this")
    path = write_jsonl(tmp_path / "rows.jsonl", [{"chosen": "a.png", "rejected": "b.png"}])
    with pytest.raises(ConfigError, match="guidance: the model is not distilled"):
        Encoder(DDPMPipeline(tiny_unet(), ddpm()), guidance=3.5)
    with pytest.raises(DataError, match=r"a\.png: no image that can be read"):
        Encoder(DDPMPipeline(tiny_unet(), ddpm()))(read_pairs(path))


@pytest.mark.parametrize("options", [{}, LORA])
def test_bfloat16_autocast_starts_at_the_reference(start, options, fresh_accelerator):
    result, weights = start(mixed_precision="bf16", **options)
    assert result.history[0]["rewards/chosen"] == 0
    assert result.history[-1]["rewards/margins"] > 0
    assert all(p.dtype == torch.float32 for p in weights.values())
    if not options:  # What is given back computes in the precision of its weights again.
        plain = tiny_unet().eval()
        plain.load_state_dict(result.denoiser.state_dict())
        x = torch.randn(1, 1, 8, 8)
        assert torch.equal(result.denoiser(x, 5).sample, plain(x, 5).sample)


@pytest.mark.parametrize("scheduler", [ddpm, flow])
def test_samples_are_the_same_for_a_seed(scheduler):
    torch.manual_seed(0)
    model, scheduler = tiny_unet(num_class_embeds=3), scheduler()
    labels = {"class_labels": torch.arange(3)}
    images = sample(model, scheduler, (3, 1, 8, 8), labels, steps=3, seed=4)
    assert torch.equal(images, sample(model, scheduler, (3, 1, 8, 8), labels, steps=3, seed=4))
    assert images.isfinite().all()
    picture = grid(torch.cat([torch.full((3, 1, 8, 8), -1.0), torch.ones(3, 1, 8, 8)]))
    assert picture.size == (24, 16)
    assert [picture.getpixel(place) for place in ((0, 0), (0, 8))] == [(0,) * 3, (255,) * 3]


RANKS = """
import json, sys
import torch
from diffusion_parts import ddpm, tensors, tiny_unet
from fastpo.trainers import run
from fastpo.trainers.diffusion import train
from fastpo.trainers.diffusion_config import DiffusionDPOConfig

torch.manual_seed(0)
config = DiffusionDPOConfig(**json.loads(sys.argv[1]))
unet = tiny_unet()
unet.register_buffer("places", torch.zeros(1), persistent=False)  # wrappers send such to all ranks
train(unet, ddpm(), tensors(8), config, eval_pairs=tensors(1))
run.leave_ranks()
"""


@pytest.mark.slow
def test_two_ranks_give_the_weights_of_one(start, tmp_path):
    """Also one side at a time, and with fewer held-out pairs than ranks."""
    options = QUIET | {"accumulation": 2, "batch_size": 4}
    start(tensors(8), tensors(1), **options | {"output": str(tmp_path / "one")})
    options |= {"batch_size": 2, "one_at_a_time": True, "output": str(tmp_path / "two")}
    script = tmp_path / "program.py"
    script.write_text(RANKS)
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    ranks = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    done = subprocess.run(
        [sys.executable, *ranks, script, json.dumps(options)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    one, two = (UNet2DModel.from_pretrained(tmp_path / name / "model") for name in ("one", "two"))
    for (name, want), got in zip(one.named_parameters(), two.parameters(), strict=True):
        # Attention does not see a bias of its keys: Adam makes steps of the rounding alone there.
        if name.endswith("to_k.bias"):
            continue
        torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-5, msg=name)
    lines = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    for line in zip(*lines, strict=True):
        # At first all rewards are zero but for rounding, which decides the accuracy.
        want, got = ({n: v for n, v in json.loads(x).items() if "accur" not in n} for x in line)
        assert got == pytest.approx(want, rel=1e-3, abs=1e-4)
