"""``fastpo train diffusion-dpo``: a pipeline and pairs of images to a trained pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from diffusers import DiffusionPipeline

from fastpo.data.records import split_by_prompt
from fastpo.integrations.diffusers import Schedule
from fastpo.trainers.checkpoints import locked, resume_point, say
from fastpo.trainers.config import ConfigError, remarks
from fastpo.trainers.diffusion import DiffusionDPOTrainer
from fastpo.trainers.diffusion_config import DiffusionDPOConfig
from fastpo.trainers.diffusion_data import Encoder, denoiser_of, read_pairs
from fastpo.trainers.diffusion_images import parse_buckets
from fastpo.trainers.diffusion_samples import sample_grid
from fastpo.trainers.diffusion_setup import POLICY, REFERENCE, loss_of


def _load_pipeline(config: DiffusionDPOConfig) -> Any:
    """The pipeline in the run's precision, but for the VAE and a denoiser trained as a whole."""
    for name in ("model", "data"):
        if not getattr(config, name):
            raise ConfigError(f"{name}: missing; give --{name} or the key in the YAML file.")
    dtypes = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    # Latents are made once, and the VAE of SDXL overflows in float16.
    whole = ("vae",) if config.lora_r else ("vae", "unet", "transformer")
    dtype = {"default": dtypes[config.mixed_precision], **dict.fromkeys(whole, torch.float32)}
    try:
        pipeline = DiffusionPipeline.from_pretrained(config.model, torch_dtype=dtype)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model: {config.model} is no pipeline of diffusers ({error})."
        ) from error
    return pipeline.to(PartialState(cpu=config.cpu).device)


def _split(
    rows: list[dict[str, Any]], config: DiffusionDPOConfig
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to train on and held-out ones, of other prompts."""
    if config.eval_data:
        inputs = loss_of(config).inputs - {*POLICY, *REFERENCE}
        return rows, read_pairs(config.eval_data, loss_inputs=inputs, say=say)
    prompts = [row.get("prompt", row.get("chosen_prompt", "")) for row in rows]
    places = {"prompt": prompts, "place": list(range(len(rows)))}
    kept, held = split_by_prompt(Dataset.from_dict(places), config.eval_share, config.seed)
    return [rows[i] for i in kept["place"]], [rows[i] for i in held["place"]] if held else []


def _save_for_pipelines(pipeline: Any, model: Any, folder: Path) -> None:
    """The LoRA as ``pipeline.load_lora_weights`` reads it, beside PEFT's own files."""
    from peft import get_peft_model_state_dict

    name, state = denoiser_of(pipeline)[0], get_peft_model_state_dict(model, adapter_name="default")
    layers = {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}
    options = {"layers": layers, "adapter_metadata": model.peft_config["default"].to_dict()}
    pipeline.save_lora_weights(
        folder,
        is_main_process=PartialState().is_main_process,
        **{f"{name}_lora_{option}": value for option, value in options.items()},
    )


def train_diffusion_dpo(config: DiffusionDPOConfig) -> dict[str, Any]:
    """Run ``fastpo train diffusion-dpo``; returns what it writes to ``results.json``."""
    with locked(config.output):
        return _train(config)


def _train(config: DiffusionDPOConfig) -> dict[str, Any]:
    if config.eval_steps and not (config.eval_data or config.eval_share):
        remedy = "Give eval_data or eval_share, or leave it out."
        raise ConfigError(f"eval_steps: no rows are held out. {remedy}")
    for line in remarks(config):
        say(line)
    pipeline = _load_pipeline(config)
    name, denoiser = denoiser_of(pipeline)
    # What does not fit shows before all images are encoded; the trainer looks again, and closer.
    inputs = loss_of(config).inputs - {*POLICY, *REFERENCE}
    Schedule(pipeline.scheduler)
    resume_point(config.output, config.resume, config.resume_from, lambda line: None)
    buckets = parse_buckets(config.aspect_ratio_buckets) if config.aspect_ratio_buckets else ()
    encoder = Encoder(
        pipeline,
        config.resolution,
        config.guidance,
        buckets=buckets,
        crop_seed=config.seed if config.random_crop else None,
    )
    read = read_pairs(config.data, config.limit, inputs, say)
    rows, held = _split(read, config)
    tensors = encoder(rows, config.progress)
    held_tensors = encoder(held, config.progress) if held else None
    say(encoder.images.report())
    trainer = DiffusionDPOTrainer(denoiser, pipeline.scheduler, tensors, config, held_tensors)
    shown = (held or rows)[: config.sample_count]
    picture = sample_grid(pipeline, encoder, shown, config.sample_steps, config.seed)
    result = trainer.train(picture if shown else None)
    output = Path(config.output)
    if config.lora_r:
        trainer.save_denoiser(output / "model")
        if hasattr(pipeline, "save_lora_weights"):
            _save_for_pipelines(pipeline, result.denoiser, output / "model")
    elif trainer.accelerator.is_main_process:
        pipeline.save_pretrained(output / "model")
    results = {
        "train_seconds": result.train_seconds, "steps": result.steps, "before": result.before,
        "after": result.after,
    }  # fmt: skip
    if trainer.accelerator.is_main_process:
        path = output / "results.json"
        path.write_text(json.dumps(results, indent=2), encoding="utf-8")
        for metric, after in result.after.items():
            print(f"{metric:28} {result.before[metric]:10.4f} -> {after:10.4f}")
        print(f"{name}: {result.steps} steps, {result.train_seconds:.1f} s of training")
    return results
