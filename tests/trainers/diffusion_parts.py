"""Tiny denoisers of every family, schedulers and pairs, for the tests of the diffusion trainer."""

import torch
from diffusers import (
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

from fastpo.trainers.diffusion_data import Rows

TEXT, WIDTH = 3, 8  # tokens of a prompt and their width


def tiny_unet(**options):
    defaults = {
        "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
        "in_channels": 1, "out_channels": 1,
    }  # fmt: skip
    return UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        **defaults | options,
    )  # fmt: skip


def tiny_conditional_unet(**options):
    defaults = {
        "in_channels": 4, "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2, "cross_attention_dim": WIDTH,
    }  # fmt: skip
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        **defaults | options,
    )  # fmt: skip


def tiny_sdxl_unet():
    # Six numbers of size and crop, of 4 features each, beside 8 of the pooled text.
    return tiny_conditional_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
    )  # fmt: skip


def tiny_dit():
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip


def tiny_sd3():
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1,
        attention_head_dim=4, num_attention_heads=2, joint_attention_dim=WIDTH,
        caption_projection_dim=8, pooled_projection_dim=8, pos_embed_max_size=8,
    )  # fmt: skip


def tiny_flux(guidance_embeds=True):
    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=8,
        guidance_embeds=guidance_embeds, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def ddpm(**options):
    return DDPMScheduler(num_train_timesteps=100, **options)


def flow(**options):
    return FlowMatchEulerDiscreteScheduler(shift=3.0, **options)


def tensors(count, channels=1, size=8, seed=0, **shapes):
    """Pairs of smooth random images of which the chosen are brighter, and conditions."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(count, *shape, generator=generator)
    found = {
        "chosen": draw(channels, 1, 1).expand(-1, -1, size, size) / 4 + 0.5,
        "rejected": draw(channels, 1, 1).expand(-1, -1, size, size) / 4 - 0.5,
    }
    return Rows(found | {name: draw(*shape) for name, shape in shapes.items()})


TEXTS = {"encoder_hidden_states": (TEXT, WIDTH)}
POOLED = TEXTS | {"pooled_projections": (8,)}
FAMILIES = {
    "unet": (tiny_unet, ddpm, 1, {}),
    "unet_condition": (tiny_conditional_unet, ddpm, 4, TEXTS),
    "sdxl": (tiny_sdxl_unet, ddpm, 4, TEXTS | {"text_embeds": (8,), "time_ids": (6,)}),
    "dit": (tiny_dit, ddpm, 4, {"class_labels": ()}),
    "sd3": (tiny_sd3, flow, 4, POOLED),
    "flux": (tiny_flux, flow, 4, POOLED | {"guidance": ()}),
}


def family(name, count=4):
    """Denoiser, scheduler and pairs of a family."""
    torch.manual_seed(0)
    make, scheduler, channels, shapes = FAMILIES[name]
    rows = tensors(count, channels, **shapes)
    if "class_labels" in rows.tensors:
        rows.tensors["class_labels"] = torch.arange(count) % 10
    return make(), scheduler(), rows


QUIET = {
    "max_steps": 4, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 0, "logging_steps": 1,
    "save_steps": 2, "tensorboard": False, "progress": False, "cpu": True, "seed": 1,
    "loss_options": {"beta": 20.0},
}  # fmt: skip
