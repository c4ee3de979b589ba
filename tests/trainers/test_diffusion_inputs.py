"""What a pipeline, a VAE, a row or a number cannot mean does not start, or stops, by its name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLWan,
    AutoencoderTiny,
    DDPMPipeline,
    VQModel,
)
from diffusers.configuration_utils import FrozenDict
from diffusers.models import autoencoders
from diffusion_parts import (
    FAMILIES,
    QUIET,
    TEXTS,
    ddpm,
    family,
    tensors,
    tiny_conditional_unet,
    tiny_flux,
    tiny_sdxl_unet,
    tiny_unet,
)
from PIL import Image
from test_diffusion_pipelines import image_rows, stable_diffusion
from tiny_rows import write_jsonl

from fastpo.data.errors import DataError
from fastpo.integrations import IntegrationError
from fastpo.integrations.diffusers import Adapter, latent_scales
from fastpo.trainers.checkpoints import checkpoints
from fastpo.trainers.config import ConfigError, build
from fastpo.trainers.diffusion import DiffusionDPOTrainer, train
from fastpo.trainers.diffusion_config import DiffusionDPOConfig
from fastpo.trainers.diffusion_data import Encoder, Rows, read_pairs
from fastpo.trainers.diffusion_errors import NonFiniteError
from fastpo.trainers.diffusion_run import train_diffusion_dpo

MEAN, STD = [0.5, -1.0, 2.0, 0.0], [2.0, 0.5, 1.0, 4.0]


def tiny_vae(**options):
    defaults = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4,
    }  # fmt: skip
    return AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(8, 8), norm_num_groups=4,
        sample_size=16, **defaults | options,
    )  # fmt: skip


def pipeline_of(vae=None, unet=None):
    """What an Encoder needs of a pipeline without texts."""
    return SimpleNamespace(vae=vae, unet=unet or tiny_unet(in_channels=4, out_channels=4))


def grey(path, level=180):
    Image.new("RGB", (16, 16), (level,) * 3).save(path)
    return str(path), torch.full((1, 3, 16, 16), level / 255 * 2 - 1)


VAES = {
    "kl": tiny_vae,
    "means": lambda: tiny_vae(latents_mean=MEAN, latents_std=STD, scaling_factor=0.5),
    "shift": lambda: tiny_vae(shift_factor=0.1, scaling_factor=1.5),
    "tiny": lambda: AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4,
    ),
    "vq": lambda: VQModel(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
    ),
    "asymmetric": lambda: AsymmetricAutoencoderKL(
        down_block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_out_channels=(8, 8), up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4,
    ),
    "deep": lambda: AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types="ResBlock",
        decoder_block_types="ResBlock", encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), scaling_factor=0.4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VAES)
@torch.no_grad()
def test_latents_are_those_the_pipelines_make(tmp_path, name):
    """(latents - mean) * scaling / std, as StableDiffusionXLPipeline and its like undo it."""
    torch.manual_seed(0)
    vae = VAES[name]().eval()
    path, pixels = grey(tmp_path / "a.png")
    encoder = Encoder(pipeline_of(vae), 16)
    out = vae.encode(pixels)
    raw = out.latent_dist.mean if hasattr(out, "latent_dist") else out[0]
    config = vae.config
    want = raw[0]
    if config.get("latents_mean"):
        want = want - torch.tensor(config.latents_mean)[:, None, None]
        want = want / torch.tensor(config.latents_std)[:, None, None]
    want = (want - (config.get("shift_factor") or 0)) * config.get("scaling_factor", 1.0)
    got = encoder.image(path)
    torch.testing.assert_close(got, want)
    back = encoder.decode(got[None])
    torch.testing.assert_close(back, vae.decode(raw).sample, rtol=1e-3, atol=1e-4)
    assert encoder.factor == 16 // raw.shape[-1]


def vae_classes():
    found = {}
    for module in pkgutil.walk_packages(autoencoders.__path__, "diffusers.models.autoencoders."):
        for name, cls in vars(importlib.import_module(module.name)).items():
            if inspect.isclass(cls) and issubclass(cls, torch.nn.Module) and hasattr(cls, "encode"):
                found[name] = cls
    return found


@pytest.mark.parametrize(("name", "cls"), sorted(vae_classes().items()))
def test_scales_of_every_vae_are_read(name, cls):
    """By the defaults of every class in diffusers: nothing of them that scales is left out."""
    known = {n: p.default for n, p in inspect.signature(cls).parameters.items()}
    shift, scale = latent_scales(SimpleNamespace(config=FrozenDict(known)))
    mean = known.get("latents_mean") or known.get("shift_factor") or 0.0
    std = torch.tensor(known.get("latents_std") or 1.0).reshape(-1, 1, 1)
    torch.testing.assert_close(shift, torch.tensor(mean).reshape(-1, 1, 1).to(shift))
    torch.testing.assert_close(scale, (known.get("scaling_factor") or 1.0) / std)


def test_vaes_that_do_not_go_with_the_denoiser_are_named():
    with pytest.raises(ConfigError, match=r"4 channels, and there are 8 by the VAE"):
        Encoder(pipeline_of(tiny_vae(latent_channels=8)))
    video = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1], temperal_downsample=[False])
    with pytest.raises(ConfigError, match=r"AutoencoderKLWan: expected a VAE of images"):
        Encoder(pipeline_of(video))
    with pytest.raises(ConfigError, match="images of 1 or 3 alone"):
        Encoder(pipeline_of())
    with pytest.raises(ConfigError, match="resolution: expected multiples of 2 pixels, got 15 x"):
        Encoder(pipeline_of(tiny_vae()), 15)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_conditional_unet(in_channels=9), "9 channels in and 4 out. Inpainting"),
        (lambda: tiny_unet(in_channels=8, out_channels=4), "8 channels in and 4 out"),
        (lambda: tiny_conditional_unet(time_cond_proj_dim=8), "time_cond_proj_dim: expected None"),
        (
            lambda: tiny_conditional_unet(addition_embed_type="image", encoder_hid_dim=8),
            "addition_embed_type: expected text_time or text or None, got 'image'",
        ),
    ],
)
def test_models_that_take_more_than_pairs_have_are_named(tmp_path, make, message):
    with pytest.raises(IntegrationError, match=message):
        Encoder(pipeline_of(tiny_vae(), make()))
    config = DiffusionDPOConfig(**QUIET | {"output": str(tmp_path)})
    with pytest.raises(IntegrationError, match=message):
        train(make(), ddpm(), tensors(4, 4, **TEXTS), config)
    assert not (tmp_path / "run.yaml").exists()


def test_an_inpainting_pipeline_stops_before_anything_is_encoded(tmp_path, monkeypatch):
    torch.manual_seed(0)
    pipeline = stable_diffusion()
    pipeline.register_modules(unet=tiny_conditional_unet(in_channels=9))
    pipeline.save_pretrained(tmp_path / "pipeline")
    monkeypatch.setattr(Encoder, "image", lambda *_: pytest.fail("encoded"))
    data = write_jsonl(tmp_path / "pairs.jsonl", image_rows(tmp_path, 4, prompt="a"))
    options = QUIET | {"model": str(tmp_path / "pipeline"), "data": data,
                       "output": str(tmp_path / "run")}  # fmt: skip
    with pytest.raises(IntegrationError, match="Inpainting"):
        train_diffusion_dpo(build(DiffusionDPOConfig, options))


def test_guidance_is_for_models_that_are_told_it():
    schnell = SimpleNamespace(vae=None, transformer=tiny_flux(guidance_embeds=False))
    with pytest.raises(ConfigError, match="guidance: the model is not distilled for guidance"):
        Encoder(schnell, 16, guidance=3.5)
    with pytest.raises(ConfigError, match="guidance: the model is distilled for guidance; give"):
        Encoder(SimpleNamespace(vae=None, transformer=tiny_flux()), 16)
    given = {"encoder_hidden_states", "pooled_projections", "guidance"}
    Adapter(tiny_flux()).check(given)
    with pytest.raises(IntegrationError, match="guidance is unknown; it takes encoder_hidden"):
        Adapter(tiny_flux(guidance_embeds=False)).check(given)


@pytest.mark.parametrize("name", FAMILIES)
def test_conditions_of_every_family_are_used_or_unknown(name):
    """No family drops one: what a model does not embed is refused, what it does is asked for."""
    model, _, rows = family(name)
    adapter = Adapter(model)
    given = rows.tensors.keys() - {"chosen", "rejected"}
    adapter.check(given)
    every = {n for _, _, _, shapes in FAMILIES.values() for n in shapes} | {"timestep_cond", "ids"}
    for other in every - given:
        with pytest.raises(IntegrationError, match=f"{other} is unknown"):
            adapter.check(given | {other})
    for one in given:
        with pytest.raises(IntegrationError, match=f"{one} is missing"):
            adapter.check(given - {one})
    wrong = [adapter.channels + 1, 8, 8]
    with pytest.raises(IntegrationError, match=rf"expected samples of {adapter.channels} channels"):
        adapter.check_sample(wrong)


def test_later_rows_that_do_not_fit_are_named(tmp_path):
    """Each row is looked at before the run writes anything."""
    config = DiffusionDPOConfig(**QUIET | {"output": str(tmp_path / "run")})
    rows = tensors(6)
    apart = Rows({n: list(t) for n, t in rows.tensors.items()})
    apart.tensors["rejected"][3] = torch.zeros(1, 8, 4)
    nan = Rows({n: t.clone() for n, t in rows.tensors.items()})
    nan.tensors["chosen"][4, 0, 2, 2] = torch.nan
    channels = Rows({n: [*t[:5], t[5].expand(2, 8, 8)] for n, t in rows.tensors.items()})
    for wrong, error, message in (
        (apart, DataError, r"pairs, row 3: expected .* \[1, 8, 8\] and \[1, 8, 4\]"),
        (nan, DataError, "pairs, row 4: chosen: expected finite numbers, got NaN"),
        (channels, IntegrationError, r"expected samples of 1 channels, got \[2, 8, 8\]"),
    ):
        with pytest.raises(error, match=message):
            train(tiny_unet(), ddpm(), wrong, config)
    assert not (tmp_path / "run" / "run.yaml").exists()


def test_tensors_of_mixed_sizes_train(tmp_path):
    rows = tensors(8)
    for side in ("chosen", "rejected"):
        found = list(rows.tensors[side])
        rows.tensors[side] = [x if i % 2 else x.expand(1, 8, 8).repeat(1, 2, 1)
                              for i, x in enumerate(found)]  # fmt: skip
    for reference in ("copy", "cached"):
        config = DiffusionDPOConfig(
            **QUIET | {"output": str(tmp_path / reference), "batch_size": 2, "reference": reference}
        )
        result = train(tiny_unet(), ddpm(), rows, config, eval_pairs=rows)
        assert result.after["loss"] < result.before["loss"]


@pytest.mark.parametrize("options", [{}, {"one_at_a_time": True}])
@pytest.mark.parametrize("part", ["prediction", "gradient"])
def test_a_number_that_is_not_finite_stops_the_run(tmp_path, options, part):
    """The pairs are named, and the last checkpoint stays the last."""
    options = QUIET | options | {"output": str(tmp_path), "save_steps": 1, "max_grad_norm": 0.0}
    trainer = DiffusionDPOTrainer(tiny_unet(), ddpm(), tensors(8), DiffusionDPOConfig(**options))
    calls, fine = [], 8 if options.get("one_at_a_time") else 2  # of two steps

    def spoil(module, inputs, output):
        calls.append(output[0])
        if len(calls) <= fine:
            return None
        if part == "gradient":
            if output[0].requires_grad:
                output[0].register_hook(lambda grad: grad * torch.nan)
            return None
        output[0][1] = torch.nan
        return output

    trainer.denoiser.register_forward_hook(spoil)
    what = r"\w+_errors of the pairs \d" if part == "prediction" else "the gradient of the loss"
    with pytest.raises(NonFiniteError, match=rf"^step \d: {what}.*: expected finite, got NaN"):
        trainer.train()
    assert trainer.step == int(checkpoints(tmp_path)[-1].name.removeprefix("checkpoint-"))
    assert all(p.isfinite().all() for p in trainer.trainable)


def test_latents_that_are_not_finite_name_the_image(tmp_path):
    vae = tiny_vae()
    encoder = Encoder(pipeline_of(vae), 16)
    torch.nn.init.constant_(vae.quant_conv.bias, torch.inf)
    with pytest.raises(DataError, match=r"a\.png: expected finite latents, got NaN or infinity"):
        encoder.image(grey(tmp_path / "a.png")[0])


def test_a_prompt_for_each_image_is_what_it_is_trained_by(tmp_path):
    """DCPO's pairs: other embeddings for the two samples, and other errors for other prompts."""
    torch.manual_seed(0)
    pipeline, found = stable_diffusion(), {}
    rows = image_rows(tmp_path, 4)
    for case, second in (("same", "a cat"), ("other", "the dog")):
        for row in rows:
            row |= {"chosen_prompt": "a cat", "rejected_prompt": second}
        read = read_pairs(write_jsonl(tmp_path / "pairs.jsonl", rows))
        pairs = Encoder(pipeline)(read)
        chosen, rejected = (
            pairs.tensors[f"{side}_encoder_hidden_states"][0] for side in ("chosen", "rejected")
        )
        assert torch.equal(chosen, rejected) == (case == "same")
        assert "encoder_hidden_states" not in pairs.tensors
        config = DiffusionDPOConfig(**QUIET | {"output": str(tmp_path / case)})
        unet = tiny_conditional_unet()
        torch.manual_seed(1)
        for parameter in unet.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        trainer = DiffusionDPOTrainer(unet, pipeline.scheduler, pairs, config, pairs)
        found[case] = trainer.evaluate()
    assert found["same"]["errors/chosen"] == found["other"]["errors/chosen"]
    assert found["same"]["errors/rejected"] != found["other"]["errors/rejected"]


def test_sizes_and_crops_are_told_to_sdxl(tmp_path, monkeypatch):
    """Of the chosen image, for both; those of the file where it has them."""
    Image.new("RGB", (40, 24)).save(tmp_path / "a.png")
    Image.new("RGB", (20, 12)).save(tmp_path / "b.png")
    pipeline = pipeline_of(tiny_vae(), tiny_sdxl_unet())
    pipeline.encode_prompt = None
    text = {"encoder_hidden_states": torch.zeros(3, 8), "text_embeds": torch.zeros(8)}
    monkeypatch.setattr(Encoder, "text", lambda *_: text)
    row = {"chosen": str(tmp_path / "a.png"), "rejected": str(tmp_path / "b.png"), "prompt": "a"}
    encoded = Encoder(pipeline, 16)([row]).tensors
    # 24 x 40 becomes 16 x 27, of which the crop starts at the sixth column.
    assert encoded["time_ids"].tolist() == [[24, 40, 0, 6, 16, 16]]
    assert encoded["chosen"].shape == encoded["rejected"].shape == (1, 4, 8, 8)
    given = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    own = {"chosen_time_ids": given, "rejected_time_ids": given[::-1]}
    encoded = Encoder(pipeline, 16)([row | own]).tensors
    assert encoded["chosen_time_ids"].tolist() == [given]
    assert encoded["rejected_time_ids"].tolist() == [given[::-1]]
    assert "time_ids" not in encoded


def test_image_pipelines_have_no_prompts(tmp_path):
    row = {"chosen": "a", "rejected": "b", "chosen_prompt": "x", "rejected_prompt": "y"}
    with pytest.raises(DataError, match="has no text encoder for the field 'prompt'"):
        Encoder(DDPMPipeline(tiny_unet(), ddpm()))([row])
