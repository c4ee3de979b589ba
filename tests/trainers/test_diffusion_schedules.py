"""Every scheduler of the installed diffusers: trained as it samples, or refused with the reason."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from diffusers import SchedulerMixin, schedulers

from fastpo.diffusion import noise_errors
from fastpo.integrations import IntegrationError
from fastpo.integrations.diffusers import Schedule

REQUIRED = {
    "AmusedScheduler": {"mask_token_id": 3},
    "VQDiffusionScheduler": {"num_vec_classes": 4},
    "RFD4ProteinaScheduler": {
        "schedule_mode": "log", "noise_mode": "1/t", "tsr_k": 1.0, "tsr_sigma": 1.0,
    },
}  # fmt: skip


def scheduler_classes():
    """All of them, also those that diffusers' first page does not show."""
    found = {}
    for module in pkgutil.walk_packages(schedulers.__path__, "diffusers.schedulers."):
        try:
            members = vars(importlib.import_module(module.name))
        except ImportError:  # torchsde is not installed with the tests
            continue
        found |= {
            name: cls
            for name, cls in members.items()
            if inspect.isclass(cls) and issubclass(cls, SchedulerMixin) and cls != SchedulerMixin
        }
    return found


CLASSES = scheduler_classes()
REFUSED = {
    "adds no noise": {
        "ConsistencyDecoderScheduler", "DDIMInverseScheduler", "DiscreteDDIMScheduler",
        "EntropyBoundScheduler", "HeliosScheduler", "IPNDMScheduler",
        "LTXEulerAncestralRFScheduler", "PiflowScheduler", "SCMScheduler", "ScoreSdeVpScheduler",
        "VQDiffusionScheduler",
    },
    "expected one that takes clean samples": {"BlockRefinementScheduler", "HeliosDMDScheduler"},
    "it has none of alphas_cumprod": {
        "AmusedScheduler", "CMStochasticIterativeScheduler", "DDPMWuerstchenScheduler",
        "KarrasVeScheduler", "MiniMaxH3Scheduler", "RePaintScheduler", "RFD4ProteinaScheduler",
        "ScoreSdeVeScheduler",
    },
    "between two times": {"FlowMapEulerDiscreteScheduler"},
}  # fmt: skip
REASONS = {name: reason for reason, names in REFUSED.items() for name in names}
FEW = {"num_train_timesteps": 100}  # Some of the classes are slow to build.
CASES = [
    pytest.param(name, FEW if "KDPM2" in name else REQUIRED.get(name, {}), id=name)
    for name in sorted(CLASSES)
]
KINDS = ("epsilon", "sample", "v_prediction", "flow_prediction")
STABLE_VIDEO = {
    "prediction_type": "v_prediction", "timestep_type": "continuous", "use_karras_sigmas": True,
    "sigma_min": 0.002, "sigma_max": 700.0, "beta_schedule": "scaled_linear",
}  # fmt: skip
WAN = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 5.0}
# Options of every class that knows them.
OPTIONS = [
    *({"prediction_type": kind} for kind in KINDS[:3]),
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"snr_shift_scale": 1.0}, {"beta_schedule": "squaredcos_cap_v2"}, {"use_karras_sigmas": True},
    {"shift": 3.0}, {"use_dynamic_shifting": True, "shift": 3.0}, {"sigma_data": 0.7},
    WAN, WAN | {"prediction_type": "sample"}, STABLE_VIDEO,
]  # fmt: skip
CASES += [
    pytest.param(name, options | FEW, id=f"{name}-{'-'.join(map(str, options.values()))}")
    for name, cls in sorted(CLASSES.items())
    for options in OPTIONS
    if options.keys() <= inspect.signature(cls).parameters.keys() and name not in REASONS
]


def built(name, options):
    """A scheduler, or None where diffusers itself has no such combination."""
    try:
        return CLASSES[name](**options)
    except (NotImplementedError, ValueError):
        return None


def noised(scheduler, clean, noise, timestep):
    """A sample by the scheduler's own noise."""
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise(clean, noise, timestep[None])
    return scheduler.scale_noise(clean, timestep[None], noise)


def seen(scheduler, clean, noise, timestep):
    """What the scheduler shows its model of it."""
    scheduler = copy.deepcopy(scheduler)
    noisy = noised(scheduler, clean, noise, timestep)
    return (
        scheduler.scale_model_input(noisy, timestep)
        if hasattr(scheduler, "scale_model_input")
        else noisy
    )


def found_clean(scheduler, prediction, clean, noise, timestep):
    """The clean sample that the scheduler finds by a prediction, where it tells."""
    noisy = noised(scheduler, clean, noise, timestep)
    if "convert_model_output" in vars(type(scheduler)):
        if hasattr(scheduler, "_init_step_index"):
            scheduler._init_step_index(timestep)
        return scheduler.convert_model_output(prediction, sample=noisy)
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(noisy, timestep)
    return getattr(scheduler.step(prediction, timestep, noisy), "pred_original_sample", None)


def plain_sampler(scheduler, steps):
    """Its choice of steps apart, which training does not have."""
    options = ("use_karras_sigmas", "use_dynamic_shifting", "clip_sample")
    plain = {name: False for name in options if scheduler.config.get(name)}
    sampler = type(scheduler).from_config(scheduler.config, **plain)
    sampler.set_timesteps(steps)
    return sampler


def formed(target):
    first = target.first if target.first_scale is None else target.first_scale * target.first
    return first if target.second is None else first + target.second_scale * target.second


@pytest.mark.parametrize(("name", "options"), CASES)
def test_schedulers_are_trained_as_they_sample(name, options):
    scheduler = built(name, options)
    if scheduler is None:
        return
    if name in REASONS:
        with pytest.raises(IntegrationError, match=rf"^scheduler {name}: .*{REASONS[name]}"):
            Schedule(scheduler)
        return
    if hasattr(scheduler, "precondition_outputs") and options.get("prediction_type") == "sample":
        with pytest.raises(IntegrationError, match="Prediction type sample is not supported"):
            Schedule(scheduler)
        return
    if name == "SASolverScheduler" and options.get("use_flow_sigmas"):
        with pytest.raises(IntegrationError, match="trained, got 0"):
            Schedule(scheduler)  # diffusers adds it the noise of alphas_cumprod
        return
    schedule, every = Schedule(scheduler), torch.arange(scheduler.config.num_train_timesteps)
    ones = torch.ones(schedule.steps, 1)
    signals, timesteps, _ = schedule.corrupt(ones, 0 * ones, torch.arange(schedule.steps))
    is_flow = options.get("use_flow_sigmas") or "Flow" in name
    assert (timesteps.diff() >= 0).all()
    if hasattr(scheduler, "alphas_cumprod") and not is_flow:
        torch.testing.assert_close(signals.square()[:, 0], scheduler.alphas_cumprod.float())
        assert options == STABLE_VIDEO | FEW or torch.equal(timesteps, every)
    clean, noise = torch.randn(2, 1, 1, 4, 4)
    sampler, met = plain_sampler(scheduler, 10), 0
    for timestep in sampler.timesteps.unique():
        index = torch.where((timesteps.double() - timestep).abs() <= 1e-6 * timestep.abs())[0][:1]
        if not len(index):
            continue
        met += 1
        noisy, _, target = schedule.corrupt(clean, noise, index)
        if not options.get("use_flow_sigmas"):  # there timesteps are cut to integers
            torch.testing.assert_close(noisy, seen(sampler, clean, noise, timestep))
        fitted = formed(target).float()
        assert noise_errors(fitted, target).item() < 1e-10
        found = schedule.split(fitted, noisy, index.item())
        if 0.02 < schedule.table.signal[index] < 0.999:  # elsewhere one of the two is lost
            for got, want in zip(found, (clean, noise), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert met or is_flow


TELLS = [
    pytest.param(name, {"prediction_type": kind} | FEW, id=f"{name}-{kind}")
    for name, cls in sorted(CLASSES.items())
    for kind in KINDS
    if name not in REASONS and "prediction_type" in inspect.signature(cls).parameters
]


@pytest.mark.parametrize(("name", "options"), TELLS)
def test_targets_are_what_the_scheduler_converts(name, options):
    """A model that predicts the target shows the scheduler the clean sample."""
    is_flow = options["prediction_type"] == "flow_prediction"
    options |= {"use_flow_sigmas": True} if is_flow else {}
    if not options.keys() <= inspect.signature(CLASSES[name]).parameters.keys():
        return
    scheduler = built(name, options)
    # Consistency functions mix the noisy sample in, DEIS solves for the noise, SA see above.
    others = {"LCMScheduler", "TCDScheduler", "DEISMultistepScheduler"}
    if scheduler is None or name in others or (name == "SASolverScheduler" and is_flow):
        return
    if hasattr(scheduler, "precondition_outputs") and options["prediction_type"] == "sample":
        return
    schedule, sampler = Schedule(scheduler), plain_sampler(scheduler, 5)
    clean, noise = torch.randn(2, 1, 1, 4, 4).double() / 4
    timestep = sampler.timesteps[2]
    index = (schedule.table.timesteps.double() - timestep).abs().argmin()
    fitted = formed(schedule.corrupt(clean, noise, index[None])[2])
    try:
        found = found_clean(sampler, fitted, clean, noise, timestep)
    except (NotImplementedError, TypeError, ValueError):  # it cannot sample by itself, or by this
        return
    if found is not None:  # within a timestep of training, where sampling visits others
        torch.testing.assert_close(found.double(), clean, rtol=0.01, atol=0.01)


def test_class_defaults_are_kept():
    """What a class has by its own default is what its pipelines were trained with."""
    for name in (
        "LCMScheduler", "TCDScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
        "CogVideoXDDIMScheduler", "UnCLIPScheduler",
    ):  # fmt: skip
        own = CLASSES[name](**FEW).alphas_cumprod
        assert (own - diffusers.DDPMScheduler(**FEW).alphas_cumprod).abs().max() > 0.01, name
        got = Schedule(CLASSES[name](**FEW)).table.signal.square()
        torch.testing.assert_close(got, own.double())


def test_video_models_are_told_a_quarter_of_log_sigma():
    """Of EulerDiscreteScheduler with continuous timesteps, as Stable Video Diffusion has it."""
    scheduler = diffusers.EulerDiscreteScheduler(**STABLE_VIDEO)
    abar = scheduler.alphas_cumprod
    told = Schedule(scheduler).corrupt(*torch.randn(2, 1000, 1), torch.arange(1000))[1]
    torch.testing.assert_close(told, 0.25 * ((1 - abar) / abar).sqrt().log())


def test_schedulers_that_add_other_noise_are_refused():
    """What a class makes of its own numbers decides, not their names."""

    class Stronger(diffusers.DDPMScheduler):
        def add_noise(self, original_samples, noise, timesteps):
            return super().add_noise(original_samples, 2 * noise, timesteps)

    match = r"^scheduler Stronger: cannot train by it: timestep 0: expected 0.* of the noise"
    with pytest.raises(IntegrationError, match=match):
        Schedule(Stronger())
    mochi = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with pytest.raises(IntegrationError, match="told the noise the other way round"):
        Schedule(mochi)
    with pytest.raises(IntegrationError, match="expected one of diffusers, got int"):
        Schedule(3)
