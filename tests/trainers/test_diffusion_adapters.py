import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import DDIMScheduler, EulerDiscreteScheduler
from diffusion_parts import FAMILIES, ddpm, family, flow, tiny_flux, tiny_sdxl_unet, tiny_unet
from peft import LoraConfig, get_peft_model

from fastpo.diffusion import noise_errors
from fastpo.integrations import IntegrationError
from fastpo.integrations.diffusers import Adapter, Schedule

STEPS = 100
# Of a squared difference of float32 numbers of some units.
ROUNDING = (8 * torch.finfo(torch.float32).eps) ** 2


def packed(x):
    """Two by two patches as tokens, channels first, row by row."""
    N, C, H, W = x.shape
    return x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(N, H * W // 4, 4 * C)


def by_hand(name, model, x, t, given):
    """The model called as its own documentation says."""
    if name == "sdxl":
        added = {"text_embeds": given["text_embeds"], "time_ids": given["time_ids"]}
        return model(x, t, given["encoder_hidden_states"], added_cond_kwargs=added).sample
    if name == "dit":
        return model(x, timestep=t, class_labels=given["class_labels"]).sample.chunk(2, 1)[0]
    if name == "sd3":
        return model(hidden_states=x, timestep=t, **given).sample
    if name == "flux":
        places = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
        ids = torch.cat([torch.zeros(16, 1), places], 1)
        text = torch.zeros(given["encoder_hidden_states"].shape[1], 3)
        return model(packed(x), timestep=t / 1000, img_ids=ids, txt_ids=text, **given).sample
    return model(x, t, *given.values()).sample


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_families_are_called_as_they_ask(name):
    model, scheduler, rows = family(name)
    model.eval()
    adapter, schedule = Adapter(model), Schedule(scheduler)
    given = {n: x for n, x in rows.tensors.items() if n not in ("chosen", "rejected")}
    adapter.check(given)
    clean = rows.tensors["chosen"]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    indices = torch.tensor([0, 10, 50, 99]) * schedule.steps // 100
    noisy, timesteps, _ = schedule.corrupt(clean, noise, indices)
    got = adapter(model, noisy, timesteps, given)
    want = by_hand(name, model, noisy, timesteps, given)
    assert got.shape == clean.shape
    assert torch.equal(packed(got) if name == "flux" else got, want)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_target_leads_back_to_the_clean_sample(prediction_type):
    """A model that predicts the target has no error, and the scheduler finds the sample by it."""
    scheduler = ddpm(prediction_type=prediction_type, clip_sample=False)
    schedule = Schedule(scheduler)
    clean, noise = torch.randn(2, 5, 1, 4, 4, dtype=torch.float64)
    indices = torch.tensor([1, 20, 50, 90, 99])
    noisy, timesteps, target = schedule.corrupt(clean, noise, indices)
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, indices))
    velocity = scheduler.get_velocity(clean, noise, indices)
    fitted = {"epsilon": noise, "sample": clean, "v_prediction": velocity}[prediction_type]
    # The scheduler's numbers are float32.
    assert noise_errors(fitted, target).max() < ROUNDING
    for n, timestep in enumerate(timesteps):
        found = scheduler.step(fitted[n : n + 1], timestep, noisy[n : n + 1]).pred_original_sample
        torch.testing.assert_close(found.float(), clean[n : n + 1].float())


def test_flow_runs_from_clean_to_noise():
    schedule = Schedule(flow())
    clean, noise = torch.randn(2, 3, 1, 4, 4)
    indices = torch.tensor([0, 500, 999])
    noisy, timesteps, target = schedule.corrupt(clean, noise, indices)
    assert timesteps.tolist() == sorted(timesteps.tolist())
    assert timesteps[-1] == 1000
    assert torch.equal(noisy[-1], noise[-1])
    rows = zip(clean.split(1), timesteps.split(1), noise.split(1), strict=True)
    scaled = [flow().scale_noise(*row) for row in rows]
    torch.testing.assert_close(noisy, torch.cat(scaled))
    assert noise_errors(noise - clean, target).max() < ROUNDING


def test_sampling_does_not_change_the_schedule():
    scheduler = flow()
    scheduler.set_timesteps(4)
    noisy = Schedule(scheduler).corrupt(*torch.randn(2, 1, 1, 2, 2), torch.tensor([300]))[0]
    assert Schedule(scheduler).steps == 1000
    torch.manual_seed(0)
    x = torch.randn(2, 1, 1, 2, 2)
    again = [Schedule(s).corrupt(*x, torch.tensor([300]))[0] for s in (scheduler, flow())]
    assert torch.equal(*again)
    assert noisy.shape == (1, 1, 2, 2)


def test_schedulers_that_only_sample_are_trained_as_their_betas_say():
    """Pipelines come with schedulers for sampling, whose add_noise may mean another scale."""
    x, t = torch.randn(2, 1, 1, 2, 2), torch.tensor([30])
    want = Schedule(ddpm()).corrupt(*x, t)[0]
    for cls in (DDIMScheduler, EulerDiscreteScheduler):
        assert torch.equal(Schedule(cls(num_train_timesteps=STEPS)).corrupt(*x, t)[0], want)


def test_densities():
    uniforms = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    counts = torch.bincount(Schedule(ddpm()).indices(uniforms), minlength=STEPS)
    assert (counts == 10).all()
    normal = Schedule(ddpm(), "logit_normal", logit_mean=1.0, logit_std=0.5)
    # The median lies at sigmoid(1); 15.8655 % lie below sigmoid(1 - 0.5), one deviation lower.
    assert normal.indices(torch.tensor([0.5, 0.158655])).tolist() == [73, 62]
    ends = normal.indices(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert ends.min() >= 0
    assert ends.max() == STEPS - 1


def test_what_does_not_fit_is_named():
    with pytest.raises(IntegrationError, match=r"expected one of UNet2DModel, .*, got Linear"):
        Adapter(torch.nn.Linear(1, 1))
    with pytest.raises(IntegrationError, match="text_embeds is missing"):
        Adapter(tiny_sdxl_unet()).check({"encoder_hidden_states", "time_ids"})
    with pytest.raises(IntegrationError, match="guidance is missing"):
        Adapter(tiny_flux()).check({"encoder_hidden_states", "pooled_projections"})
    Adapter(tiny_flux(guidance_embeds=False)).check({"encoder_hidden_states", "pooled_projections"})
    with pytest.raises(IntegrationError, match="text is unknown; it takes none"):
        Adapter(tiny_unet()).check({"text"})
    with pytest.raises(IntegrationError, match="class_labels is missing"):
        Adapter(tiny_unet(num_class_embeds=3)).check(set())
    with pytest.raises(IntegrationError, match=r"prediction_type: .*got 'other'"):
        Schedule(ddpm(prediction_type="other"))
    with pytest.raises(IntegrationError, match=r"timestep density: .*got 'normal'"):
        Schedule(ddpm(), "normal")


def test_adapters_of_peft_are_seen_through():
    model = tiny_unet()
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert Adapter(wrapped).name == "UNet2DModel"
