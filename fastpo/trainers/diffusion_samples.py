"""Samples of a denoiser, and their picture: a grid before training and one after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor

from fastpo.integrations.diffusers import Adapter, Schedule, unpack
from fastpo.trainers.diffusion_data import Encoder


@torch.no_grad()
def sample(
    denoiser: torch.nn.Module,
    scheduler: Any,
    shape: tuple[int, ...],
    condition: Mapping[str, Tensor] | None = None,
    *,
    steps: int = 50,
    seed: int = 0,
) -> Tensor:
    """Samples by DDIM, or by Euler steps of a flow, without guidance; the same for a seed.

    Each step goes to the next noise level with the clean sample and the noise of the prediction.

    Args:
        denoiser: see :class:`fastpo.integrations.diffusers.Adapter`.
        scheduler: the one it was trained with; left as it is.
        shape: [N, C, H, W].
        condition: tensors [N, ...] by name.
        steps: of denoising.
        seed: of the initial noise, drawn on the CPU.

    Returns:
        [N, C, H, W] on the denoiser's device; latents are not decoded.
    """
    adapter, schedule = Adapter(denoiser), Schedule(scheduler)
    device = next(denoiser.parameters()).device
    condition = {name: tensor.to(device) for name, tensor in (condition or {}).items()}
    adapter.check(condition)
    adapter.check_sample(shape[1:])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    clean, table, clip = torch.zeros_like(noise), schedule.table, clip_range(scheduler)
    # At a signal of 0, predicted noise does not tell what to denoise to.
    last = schedule.steps - 1 - int(schedule.is_of_noise and table.signal[-1] == 0)
    indices = torch.linspace(last, 0, steps).round().long().tolist()
    for index in indices:
        noisy = table.signal[index] * clean + table.noise[index] * noise
        timesteps = table.timesteps[index].to(device).expand(shape[0])
        prediction = adapter(denoiser, noisy, timesteps, condition)
        clean, noise = schedule.split(prediction, noisy, index)
        clean = clean.clamp(-clip, clip)
    return clean


def clip_range(scheduler: Any) -> float:
    """What the scheduler clips predicted clean samples to when it samples."""
    config = scheduler.config
    return config.get("clip_sample_range", 1.0) if config.get("clip_sample") else math.inf


def grid(images: Tensor) -> Image.Image:
    """Images in [-1, 1], [N, C, H, W] of 1 or 3 channels, in rows of one picture."""
    pixels = VaeImageProcessor.denormalize(images.float().cpu())
    images = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pixels))
    rows = max(d for d in range(1, int(len(images) ** 0.5) + 1) if len(images) % d == 0)
    return make_image_grid(images, rows=rows, cols=len(images) // rows)


def sample_grid(
    pipeline: Any, encoder: Encoder, rows: list[dict[str, Any]], steps: int, seed: int
) -> Callable[[torch.nn.Module], Image.Image]:
    """A function from the denoiser to the grid of one image per row.

    Pipelines with text encoders sample themselves, with their own scheduler and guidance; others
    by :func:`sample`. Of a pair with two conditions, that of the chosen image.
    """
    height, width = encoder.size

    def by_pipeline(_: torch.nn.Module) -> Image.Image:
        # The pipeline holds the trained denoiser, adapters included.
        pipeline.set_progress_bar_config(disable=True)
        images = []
        for n, row in enumerate(rows):
            generator = torch.Generator().manual_seed(seed + n)
            prompt = row.get("prompt", row.get("chosen_prompt"))
            latents = pipeline(
                prompt, height=height, width=width, num_inference_steps=steps,
                generator=generator, output_type="latent",
            ).images  # fmt: skip
            if latents.ndim == 3:
                latents = unpack(latents, height // encoder.factor, width // encoder.factor)
            images.append(encoder.decode(latents))
        return grid(torch.cat(images))

    def by_steps(denoiser: torch.nn.Module) -> Image.Image:
        shape = len(rows), encoder.adapter.channels, height // encoder.factor
        shape = *shape, width // encoder.factor
        condition = {}
        for name in ("class_label", "chosen_class_label"):
            if name in rows[0]:
                condition["class_labels"] = torch.tensor([row[name] for row in rows])
        made = sample(denoiser, pipeline.scheduler, shape, condition, steps=steps, seed=seed)
        return grid(encoder.decode(made))

    return by_pipeline if hasattr(pipeline, "encode_prompt") else by_steps
